"""The engine writes for each job what its model writes alone, and gives places back."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import contextmanager

import pytest

import luthier
from luthier.errors import RecipeError
from luthier.model.continuous import SideBySide
from luthier.serve.server.engine import Busy, Engine, Job, Stopping
from luthier.serve.server.models import load_served, named
from luthier.serve.server.sampling import Sampling

QUESTIONS = ("3+1=", "What is 12+1?", "x")


@contextmanager
def running(served, **limits):
    engine = Engine(served.groups, **limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def job_of(served, name: str, question: str, n: int = 1, **how) -> tuple[Job, queue.Queue]:
    model = served.models[name]
    pieces: queue.Queue = queue.Queue()
    settings = Sampling(**{"max_tokens": 12, **how})
    tokens = model.chat_prompt([{"role": "user", "content": question}])
    put = lambda job, piece: pieces.put(piece)
    return Job(model, tokens, settings, put, n, model.seed(settings.seed)), pieces


def texts_of(job: Job, pieces: queue.Queue) -> list[str]:
    """What a job wrote. Raises what it failed with."""
    texts, open_samples = [""] * job.n, job.n
    while open_samples:
        piece = pieces.get(timeout=60)
        if piece.error is not None:
            raise piece.error
        texts[piece.sample] += piece.text
        open_samples -= piece.finish_reason is not None
    return texts


@pytest.mark.long
def test_each_model_answers_as_it_does_alone(served, runs, shallow):
    shared, own = sorted(served.groups, key=lambda group: group is not served.models["low"].group)
    assert served.models["lower"].group is shared and served.models["scaled"].group is own
    assert list(served.models) == [*runs, shallow] and served.models["low"].parent == shallow
    assert all(isinstance(group.batch, SideBySide) for group in served.groups)
    jobs = []
    with running(served) as engine:
        for temperature in (0.0, 0.9):
            for question in QUESTIONS:
                for name in served.models:
                    n = 1 if name == "low" else 2
                    jobs.append(job_of(served, name, question, n, temperature=temperature, top_p=0.9, seed=5))
                    engine.submit([jobs[-1][0]])
        answers = [texts_of(*each) for each in jobs]
        assert engine.count_running() == engine.count_waiting() == 0
    alone = {name: luthier.load(model.path, dtype="float32") for name, model in served.models.items()}
    different = set()
    for (job, _), answer in zip(jobs, answers, strict=True):
        loaded = alone[job.served.name]
        how = {"temperature": job.settings.temperature, "top_p": job.settings.top_p, "max_new_tokens": 12}
        stop = loaded.roles.renderer.stop_ids
        (written,) = loaded.roles.policy.generate([job.tokens], seeds=[job.seed], n=job.n, stop=stop, **how)
        assert answer == [loaded.roles.renderer.answer(ids) for ids in written]
        different.update(answer)
    assert len(different) > len(served.models)


@pytest.mark.long
def test_samples_end_where_their_settings_say(served):
    with running(served) as engine:
        plain = job_of(served, "low", "3+1=", ignore_eos=True, max_tokens=20)
        engine.submit([plain[0]])
        (text,) = texts_of(*plain)
        stop = text[4:7]
        stopped = job_of(served, "low", "3+1=", ignore_eos=True, max_tokens=20, stop=(stop,), logprobs=3)
        engine.submit([stopped[0]])
        assert texts_of(*stopped) == [text[: text.index(stop)]]
        forced = job_of(served, "low", "3+1=", logit_bias={70: 100.0}, max_tokens=3, logprobs=0)
        engine.submit([forced[0]])
        assert texts_of(*forced) == [served.models["low"].texts.text([70] * 3)]
        penalized = job_of(served, "low", "3+1=", logit_bias={70: 90.0, 71: 89.9}, frequency_penalty=1.0)
        engine.submit([penalized[0]])
        assert set(texts_of(*penalized)[0]) == set(served.models["low"].texts.text([70, 71]))


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def gate(served, monkeypatch):
    """Nothing is written in the group of the LoRA runs beyond first tokens until what is put here is true."""
    batch, conditions = served.models["low"].group.batch, []
    step = batch.next

    def next_when_open(tokens):
        for condition in conditions:
            wait_until(condition)
        return step(tokens)

    monkeypatch.setattr(batch, "next", next_when_open)
    return conditions


def test_places_are_limited_and_come_free(served, gate):
    opened = threading.Event()
    gate.append(opened.is_set)
    with running(served, max_running=2, max_waiting=1) as engine:
        endless = {"max_tokens": 400, "ignore_eos": True}
        first, second = (job_of(served, "low", "3+1=", **endless) for _ in range(2))
        engine.submit([first[0], second[0]])
        first[1].get(timeout=60)
        second[1].get(timeout=60)
        third = job_of(served, "lower", "3+1=")
        engine.submit([third[0]])
        with pytest.raises(Busy) as refusal:
            engine.submit([job_of(served, "low", "3+1=")[0]])
        assert 1 <= refusal.value.retry_after <= 60
        engine.cancel([first[0]])  # nobody hears it any more: the third gets its place
        opened.set()
        assert len(texts_of(*third)) == 1
        engine.cancel([second[0]])
        wait_until(lambda: engine.count_running() == 0)
        many = job_of(served, "low", "3+1=", n=5)  # more than there are places: alone
        engine.submit([many[0]])
        assert len(set(texts_of(*many))) == 1


def test_an_error_ends_those_it_concerns_and_no_others(served, monkeypatch):
    with running(served) as engine:
        group = served.models["low"].group
        step, calls, messages = group.batch.next, [], []

        def next_or_fail(tokens):
            calls.append(tokens)
            if len(calls) == 3:
                raise RuntimeError(messages[-1])
            return step(tokens)

        monkeypatch.setattr(group.batch, "next", next_or_fail)
        for message, kind in (("a shape is wrong", RuntimeError), ("CUDA out of memory", RecipeError)):
            calls.clear()
            messages.append(message)
            struck = job_of(served, "low", "3+1=", max_tokens=400, ignore_eos=True)
            other = job_of(served, "scaled", "3+1=")
            engine.submit([struck[0], other[0]])
            with pytest.raises(kind):
                texts_of(*struck)
            assert texts_of(*other)
        calls.clear()
        again = job_of(served, "low", "3+1=", max_tokens=2)
        engine.submit([again[0]])
        assert texts_of(*again) and engine.health()["status"] == "ok"


def test_the_end_is_heard_by_all(served, gate):
    with running(served, max_running=1) as engine:
        gate.append(lambda: engine.ended)
        written = job_of(served, "low", "3+1=", max_tokens=400, ignore_eos=True)
        waiting = job_of(served, "low", "3+1=")
        engine.submit([written[0], waiting[0]])
        written[1].get(timeout=60)
        engine.drain()
        with pytest.raises(Stopping):
            engine.submit([job_of(served, "low", "3+1=")[0]])
        engine.stop()
        for job, pieces in (written, waiting):
            with pytest.raises(Stopping):
                texts_of(job, pieces)
    gate.clear()
    with running(served) as engine:  # whoever is being written when no more are taken is written to the end
        written = job_of(served, "low", "3+1=", max_tokens=40, ignore_eos=True)
        engine.submit([written[0]])
        engine.drain()
        assert texts_of(*written)
        engine.thread.join(60)
        assert not engine.thread.is_alive()


def test_models_are_named_by_their_folders(runs, tiny, tmp_path):
    assert named(["runs/a", "b=runs/a", "toy:lm"]) == {"a": "runs/a", "b": "runs/a", "toy:lm": "toy:lm"}
    with pytest.raises(RecipeError, match="would both be served as 'a'"):
        named(["x/a", "y/a"])
    with pytest.raises(RecipeError):
        load_served([str(tmp_path)])
