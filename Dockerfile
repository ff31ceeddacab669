# docs/docker.md says how to build and run this.
FROM python:3.11-slim-bookworm

# Wheels for a CPU. For a GPU another of PyTorch's indices, as https://download.pytorch.org/whl/cu130: its wheels bring CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Bounds as in pyproject.toml: an index that has only older ones fails here, instead of PyPI's CUDA build coming with lbp.
# Packages' own tests are a tenth of the image.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11" "torchvision>=0.26" \
 && find /usr/local -type d \( -name tests -o -path '*/torch/test' \) -prune -exec rm -r {} +

COPY pyproject.toml README.md /src/
COPY lbp /src/lbp
COPY conf /src/conf
RUN pip install --no-cache-dir /src \
 && find /usr/local -type d -name tests -prune -exec rm -r {} +

# For whatever user --user names: folders that he may write, and a home and a name where /etc/passwd has none for him.
RUN useradd --uid 1000 --home-dir /tmp lbp && mkdir -p /data /work/outputs && chmod 1777 /data /work /work/outputs
ENV HOME=/tmp USER=lbp LBP_DATA=/data PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
VOLUME ["/data", "/work/outputs"]
USER 1000

ARG COMMIT=unknown
LABEL org.opencontainers.image.revision=$COMMIT

ENTRYPOINT ["lbp"]
