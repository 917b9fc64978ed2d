#!/bin/sh
# Install or upgrade: ./apply.sh gpu|production [--dry-run]. Migrates the database before it updates the control plane.
set -eu
overlay=${1:?"usage: apply.sh OVERLAY [--dry-run]"}
here=$(cd "$(dirname "$0")" && pwd)
folder=$here/overlays/$overlay
if grep -n 'change-me' "$folder/settings.env"; then
  echo "apply.sh: fill in the lines above in $folder/settings.env" >&2
  exit 1
fi
if [ "${2:-}" = --dry-run ]; then
  exec kubectl apply --dry-run=server -k "$folder"
fi

kubectl apply -f "$here/base/namespace.yaml"
for secret in dde-control dde-ray-token; do
  kubectl -n dde get secret "$secret" >/dev/null || {
    echo "apply.sh: there is no Secret $secret: run make-secrets.py first" >&2
    exit 1
  }
done
# A Job cannot be changed, and a finished one would not run again.
kubectl -n dde delete job dde-migrate dde-bucket --ignore-not-found --wait
kubectl apply -k "$folder" -l dde-part!=control
kubectl -n dde wait job/dde-migrate --for=condition=complete --timeout=30m
kubectl apply -k "$folder"
kubectl -n dde rollout status deployment/dde-control --timeout=30m
