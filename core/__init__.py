"""LoRA on torch: inject, train, merge, save and analyse low-rank updates of frozen weights."""

from core.adapter import Adapter
from core.config import ALL_LINEAR, Config, LoRAConfig, Setting, TrainConfig, setting, settings
from core.devices import memory_bytes, memory_source, peak_memory_bytes, resolve_device, resolve_dtype
from core.errors import AdapterFileError, LoRAError, NonFiniteLossError, TargetError
from core.events import Evaluated, Event, Failed, Finished, Noted, Started, Step, from_record, to_record
from core.geometry import Amplification, amplification, subspace_similarity
from core.inject import (
    Injection,
    Target,
    adaptable,
    eject,
    inject,
    injection_of,
    lora_layers,
    merge,
    merged_copy,
    plan,
    strength,
    unmerge,
)
from core.layers import Factors, LoRALinear
from core.spectrum import Spectrum, random_sigma, spectrum
from core.train import evaluate, token_losses, train
