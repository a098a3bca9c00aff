"""teasr: data synthesis, any-step distillation and serving for real-world super-resolution."""

__version__ = "0.1.0"
