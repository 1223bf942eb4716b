"""Models on their way to others: what ``difffit export`` writes, one file a destination.

- :mod:`.pipeline`: a pipeline of diffusers
- :mod:`.hub`: a folder to publish, with a card
- :mod:`.lora`: of a transformer of diffusers, the file that ComfyUI or LyCORIS reads
- :mod:`.peft_adapter`: the same delta as an adapter of PEFT
"""

from .hub import export_card
from .lora import export_lora
from .peft_adapter import export_peft
from .pipeline import export_pipeline

__all__ = ["export_card", "export_lora", "export_peft", "export_pipeline"]
