"""Networks and linear models with scikit-learn's conventions, trained by the fused step, for NumPy without torch.

To use them, change the import: ``from fusedopt.estimators import MLPClassifier``. Needs scikit-learn:
``pip install '.[sklearn]'`` in a checkout.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "fusedopt.estimators needs scikit-learn: pip install '.[sklearn]' in a checkout of fusedopt"
    ) from error

from ._augment import Compose, Flip, Noise, Rotate, Shift
from ._linear import LinearClassifier, LinearRegressor
from ._mlp import MLPClassifier, MLPRegressor

__all__ = [
    "Compose",
    "Flip",
    "LinearClassifier",
    "LinearRegressor",
    "MLPClassifier",
    "MLPRegressor",
    "Noise",
    "Rotate",
    "Shift",
]
