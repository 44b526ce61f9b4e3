# The image of every pod in cluster-kuberay.yaml: Ray's own, of the version in constraints.txt, with rankfront in it.
#
#   docker build -f configs/cluster-kuberay.Dockerfile -t REGISTRY/rankfront .      (from the repository root)
FROM rayproject/ray:2.60.0-py312

WORKDIR /home/ray/rankfront
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users search search
COPY --chown=ray:users actors actors
# torch brings CUDA's libraries; the driver is the node's.
RUN pip install --no-cache-dir -c constraints.txt ".[postgres]" "ray[default]"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/ray
