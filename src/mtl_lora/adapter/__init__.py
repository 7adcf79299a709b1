"""Adapters for the linear layers of any model; torch and safetensors are all they need."""
