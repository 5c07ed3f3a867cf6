"""prompt_controller: nothing at strength 0, and a step that makes the attribute likelier."""

from __future__ import annotations

import pytest
import torch

from helpers.stages import make_roles
from helpers.styles import LETTERS, PROMPT, attribute_share, preference_rows, style_model
from luthier.methods.decoders.arithmetic._joined import companion
from luthier.methods.decoders.steering.prompt_controller import Group, PromptController


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    folder = style_model(tmp_path_factory.mktemp("styles"))
    return make_roles(folder, tuner={"name": "bitfit", "also": ["norms"]})


def how(**changes):
    return {"seeds": [0], "max_new_tokens": 8, "temperature": 1.0, "stop": [1], **changes}


def test_strength_zero_is_the_plain_decoder(styles):
    prompt = styles.renderer.prompt({"id": "x", "prompt": PROMPT})
    plain = styles.policy.generate([prompt], **how(n=4))
    off = PromptController(data=preference_rows(), strength=0.0)
    assert off.generate(styles, [{}], [prompt], **how(n=4)) == plain
    # the slow way, too
    texts = off.write(styles, companion(styles.policy, "base"), [prompt], **how(n=4))
    assert [[text.ids for text in group] for group in texts] == plain
    assert max(max(text.interventions) for text in texts[0]) < 1e-5


def test_a_step_raises_the_attribute(styles):
    """At the first token the probability of the attribute's letters rises, with the gradient of autograd."""
    controller = PromptController(data=preference_rows(), strength=0.2)
    prompt = styles.renderer.prompt({"id": "x", "prompt": PROMPT})
    classifier = controller.classifier(styles, companion(styles.policy, "base"))
    group = Group(controller, styles.policy, classifier, prompt, 1)
    letters = styles.renderer.tokenizer.convert_tokens_to_ids(list(LETTERS[0]))
    still = torch.zeros(1, *group.prompt_embeddings.shape)
    with styles.policy.eval_mode(), torch.no_grad():
        moved = group.moved(still, [[]])
        before, after = group.logprobs(still, [[]]), group.logprobs(moved, [[]])
    chance = [float(logprobs.exp()[0, letters].sum()) for logprobs in (before, after)]
    assert chance[1] > chance[0] + 0.05
    ids = [styles.renderer.tokenizer.encode(row["chosen"]) for row in preference_rows()[:8]]
    others = [styles.renderer.tokenizer.encode(row["rejected"]) for row in preference_rows()[:8]]
    assert min(classifier.probabilities(prompt, ids)) > 0.8
    assert max(classifier.probabilities(prompt, others)) < 0.2


def test_more_texts_have_the_attribute(styles):
    prompt = styles.renderer.prompt({"id": "x", "prompt": PROMPT})
    controller = PromptController(data=preference_rows(), strength=0.5)
    share = []
    for decoder in (PromptController(data=preference_rows(), strength=0.0), controller):
        (answers,) = decoder.generate(styles, [{}], [prompt], **how(n=24))
        share.append(attribute_share(styles, answers))
    assert share[1] > share[0] + 0.2
