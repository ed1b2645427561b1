# svcli on ONNX Runtime for CUDA: docker build -f docker/cuda.Dockerfile -t svcli:cuda .
# The run time wants CUDA 13 and cuDNN 9, which the base has; the driver is the host's.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 AS build
# The distribution has one version of each at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /opt/svcli \
    && /opt/svcli/bin/pip install --no-cache-dir -c constraints.txt ".[gpu,serve]"

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/svcli /opt/svcli
ENV PATH=/opt/svcli/bin:$PATH
RUN useradd --create-home --uid 10001 svcli \
    && install --directory --owner svcli /bundles
# By number, so that whoever runs it can see that it is not root.
USER 10001
WORKDIR /bundles
VOLUME /bundles
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The server refuses to be reached from outside without a key: docker run -e SVCLI_API_KEY=...
ENTRYPOINT ["svcli"]
CMD ["serve", "--host", "0.0.0.0", "--engine", "onnxruntime-cuda"]
