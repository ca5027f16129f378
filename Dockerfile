# docker build -t gdn2 .                              CPUs
# docker build -t gdn2 --build-arg EXTRA=cuda13 .     NVIDIA GPUs
# docker run --rm -v "$PWD/runs:/work/runs" gdn2 \
#     train --config=tiny_cpu --workdir=runs/tiny     (GPUs: docker run --gpus=all)
FROM python:3.12-slim

ARG EXTRA=data
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt \
      "/src[data,hub,${EXTRA}]" \
    && rm -rf /src

RUN useradd --create-home gdn2 && mkdir /work && chown gdn2 /work
USER gdn2
WORKDIR /work
ENTRYPOINT ["gdn2"]
CMD ["--help"]
