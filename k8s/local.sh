#!/bin/sh
# Everything on this machine: a kind cluster (or the current one: CLUSTER=minikube), KubeRay, the images, overlays/local.
# Needs docker, kubectl, helm, python3 and kind or minikube; 16 GB of memory and 40 GB of disk.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cluster=${CLUSTER:-kind}
control=$(sed -n 's/^CONTROL_IMAGE=//p' "$here/overlays/local/settings.env")
ray=$(sed -n 's/^DDE_RAYJOB_IMAGE=//p' "$here/overlays/local/settings.env")

case $cluster in
  kind) kind get clusters | grep -qx dde || kind create cluster --name dde ;;
  minikube) minikube status >/dev/null || minikube start --cpus=6 --memory=16g --disk-size=60g ;;
  *) echo "local.sh: CLUSTER must be kind or minikube, not $cluster" >&2; exit 1 ;;
esac
helm repo add kuberay https://ray-project.github.io/kuberay-helm/ --force-update
helm upgrade --install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --wait

docker build -f "$here/../docker/control.Dockerfile" -t "$control" "$here/.."
docker build -f "$here/../docker/ray.Dockerfile" -t "$ray" \
  --build-arg TORCH=cpu --build-arg TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/ "$here/.."
for image in "$control" "$ray"; do
  case $cluster in
    kind) kind load docker-image --name dde "$image" ;;
    minikube) minikube image load "$image" ;;
  esac
done

kubectl apply -f "$here/base/namespace.yaml"
kubectl -n dde get secret dde-control >/dev/null 2>&1 || "$here/make-secrets.py" --local
"$here/apply.sh" local
echo "the API: kubectl -n dde port-forward service/dde-control 8080"
echo "its key: kubectl -n dde get secret dde-control -o 'jsonpath={.data.api_key}' | base64 -d"
