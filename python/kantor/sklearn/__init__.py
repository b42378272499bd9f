"""Estimators for scikit-learn: classes from a few labels, and one set of rows moved onto another."""

try:
    from sklearn.utils.validation import validate_data as _validate_data  # noqa: F401
except ImportError as error:
    raise ImportError('kantor.sklearn needs scikit-learn 1.6 or newer: pip install "kantor[sklearn]"') from error

from kantor.sklearn.diffusion_classifier import DiffusionClassifier
from kantor.sklearn.optimal_transport_adapter import OptimalTransportAdapter

__all__ = ["DiffusionClassifier", "OptimalTransportAdapter"]
