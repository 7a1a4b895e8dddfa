FROM python:3.11-slim
ARG EXTRAS=tpu,gcs
WORKDIR /llama_jax
COPY . .
RUN pip install --no-cache-dir ".[$EXTRAS]"
