"""The objective v: the velocity of x_t along the circle of signal and noise (Salimans & Ho 2022, arXiv 2202.00512).

v = sqrt(ab) noise - sqrt(1 - ab) x_0 (section 4 and appendix D). It determines x_0 and the noise at every noise level,
even at a signal-to-noise ratio of 0, where a predicted noise does not determine x_0 (Lin et al. 2024,
arXiv 2305.08891). Importance and variance are those of Gaussian diffusion.
"""

from torch import Tensor

from edt_core.diffusion.gaussian import GaussianObjective
from edt_core.diffusion.schedule import Coefficients


class VPrediction(GaussianObjective):
    """The model predicts v."""

    name = "v_prediction"
    meaning = "v (arXiv 2202.00512), and a variance in the learned range"
    prediction_type = "v_prediction"
    words = ("v", "v_prediction", "v_pred", "pred_v", "predict_v")

    def target(self, x_start: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """v itself."""
        return c.signal_scale * noise - c.noise_scale * x_start

    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / (SNR + 1), since the squared error of v is SNR + 1 times that of x_0."""
        return snr.clamp(max=gamma) / (snr + 1.0)

    def x_start(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """sqrt(ab) x_t - sqrt(1 - ab) v."""
        return c.signal_scale * x_t - c.noise_scale * prediction

    def noise(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """sqrt(1 - ab) x_t + sqrt(ab) v."""
        return c.noise_scale * x_t + c.signal_scale * prediction
