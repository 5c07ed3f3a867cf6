# docker build --tag luthier .            for CPUs
# docker build --tag luthier --build-arg TORCH=https://download.pytorch.org/whl/cu128 .   for GPUs
# docker run --rm --volume "$PWD:/workspace" luthier tune --model toy:lm --data rows.jsonl
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /dist .

FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN useradd --create-home --uid 1000 luthier && pip install --no-cache-dir "torch<2.14" --index-url "$TORCH"
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir "$(ls /dist/*.whl)[studio,search]" && rm -r /dist
USER luthier
WORKDIR /workspace
ENV HF_HOME=/workspace/.cache/huggingface
ENTRYPOINT ["luthier"]
CMD ["--help"]
