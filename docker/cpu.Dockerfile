# svcli on ONNX Runtime, without torch: docker build -f docker/cpu.Dockerfile -t svcli:cpu .
FROM python:3.13.7-slim-trixie AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/svcli \
    && /opt/svcli/bin/pip install --no-cache-dir -c constraints.txt ".[cpu,serve]"

FROM python:3.13.7-slim-trixie
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
CMD ["serve", "--host", "0.0.0.0"]
