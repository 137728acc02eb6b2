# One image that runs every stage:
#
#   docker build -t recsys_dist .                            CPU
#   docker build -t recsys_dist --build-arg VARIANT=cuda .   CUDA
#   docker run -v /data:/data recsys_dist jobs/nightly.py --conf /data/my.yaml
#
# VARIANT picks the locked set of packages, the same files that `make demo` installs. The CUDA libraries come
# with those packages; the host needs only the driver.
FROM python:3.11.14-slim-bookworm

ARG VARIANT=cpu
# The index with the CPU build of torch that PyTorch's install page names; the CUDA variant needs none.
ARG TORCH_INDEX=""

# libopenblas: without it Spark's linear algebra, and so ALS, runs in plain Java.
# Debian removes old versions from its archive, so a pinned apt version would not install for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openjdk-17-jre-headless libopenblas0 procps tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 recsys

WORKDIR /opt/recsys_dist
COPY requirements requirements
RUN pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    --requirement "requirements/${VARIANT}.txt"

COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY recsys_dist recsys_dist
COPY jobs jobs
RUN python -m compileall -q recsys_dist jobs && python -m recsys_dist.spark && mkdir runs && chown recsys runs

# recsys, by number so that a cluster can check that it is not root.
USER 1000
ENTRYPOINT ["tini", "--", "python"]
CMD ["jobs/nightly.py", "--help"]
