"""Adapters for the linear layers of any PyTorch model; they need only torch and safetensors."""
