"""llm_quantize: turn a Hugging Face checkpoint into the best model that fits the memory you have, measured and explained.

    import llm_quantize as lq
    lq.quantize("model", "Q4_K_M")

Importing the package loads no torch: each name below is fetched when it is first used (PEP 562).
"""
__version__ = "0.2.0"

_HOME = {
    "api": ("quantize", "plan", "analyze", "quality_report", "compare", "validate", "info", "sample"),
    "gguf.profiles": ("Profile",),
    "calibration.imatrix": ("ImportanceMatrix",),
    "models.checkpoint": ("open_checkpoint",),
    "gguf.reader": ("open_gguf",),
    "errors": (
        "LLMQuantizeError", "ArgumentError", "ModelNotFoundError", "AuthenticationError", "OutOfMemoryError",
        "ValidationError", "CheckpointError", "ConversionError", "CancelledError", "ImatrixError",
        "QualityDegradationError", "CoherenceError", "ProfileError", "SmoothQuantError", "CalibrationError",
        "ImportanceError",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = [*_MODULE, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
