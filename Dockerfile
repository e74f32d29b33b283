# spkd for CPUs. docker build -t spkd . && docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" spkd doctor
FROM python:3.11-slim-bookworm AS build
ARG EXTRAS=cpu,teachers,onnx,codecs
WORKDIR /src
RUN python3 -m venv /opt/spkd
# The usual torch brings 3 GB of CUDA libraries.
COPY constraints.txt ./
RUN /opt/spkd/bin/pip install --no-cache-dir -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY spkd ./spkd
RUN /opt/spkd/bin/pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 spkd
COPY --from=build /opt/spkd /opt/spkd
# Other users than spkd, as of `docker run --user`, have no home: what matplotlib and models keep goes to /tmp.
ENV PATH=/opt/spkd/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/tmp/huggingface
USER 1000
WORKDIR /work
ENTRYPOINT ["spkd"]
CMD ["--help"]
