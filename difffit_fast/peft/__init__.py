"""DiffFit as a method of PEFT, registered with PEFT's own registry when this module is imported (extra ``peft``).

>>> from peft import PeftModel, get_peft_model                                          # doctest: +SKIP
>>> from difffit_fast.peft import DiffFitPeftConfig                                     # doctest: +SKIP
>>> model = get_peft_model(transformer, DiffFitPeftConfig())                            # doctest: +SKIP
>>> model.save_pretrained("adapter")                                                    # doctest: +SKIP
>>> model = PeftModel.from_pretrained(transformer, "adapter")                           # doctest: +SKIP

Import it before ``from_pretrained``, too: PEFT looks the method up by the name "DIFFFIT" in ``adapter_config.json``.
"""

from .._extras import require

require("peft", "peft", "DiffFit as one of its methods")

from .config import DiffFitPeftConfig  # noqa: E402
from .layer import DiffFitLayer  # noqa: E402
from .tuner import DiffFitTuner, register  # noqa: E402

register()

__all__ = ["DiffFitLayer", "DiffFitPeftConfig", "DiffFitTuner"]
