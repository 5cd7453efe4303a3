# docker build -t psec_jax .                                             CPU
# docker build -t psec_jax:cuda --build-arg 'JAX=jax[cuda12]' .            NVIDIA GPUs
#
# docker run --init --rm -v "$PWD/runs:/psec_jax/runs" psec_jax launch.pretrain \
#     --workdir=runs/stand --library=runs/library
# With GPUs: docker run --init --gpus=all ... psec_jax:cuda ...
#
# --init: as process 1 Python would hear SIGTERM only while it trains.
FROM python:3.11-slim-bookworm

# EGL and OpenGL with Mesa's software driver, for videos.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libgl1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid=1000 psec \
    && install --directory --owner=psec /psec_jax /psec_jax/runs

# jax[cuda12] brings CUDA's libraries in the version of the pinned jax.
ARG JAX=jax
COPY requirements.txt /tmp/
RUN pip install --no-cache-dir --requirement /tmp/requirements.txt "$JAX"

WORKDIR /psec_jax
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .

# With the driver's EGL, videos are drawn on the GPU.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics \
    PSEC_DATA_DIR=/psec_jax/runs/data \
    PYTHONUNBUFFERED=1
USER psec
ENTRYPOINT ["python", "-m"]
CMD ["launch.pretrain", "--help"]
