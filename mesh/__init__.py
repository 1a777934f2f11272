"""llama-mesh: one endpoint for all the GPU boxes somebody owns."""

__version__ = "0.1.0"
