"""LoRA on torch: inject, train, merge, save and analyse low-rank updates of frozen weights."""

from core.adapter import Adapter
from core.algebra import Truncation, difference, distance, equal, inner_product, norm, truncate, weighted_sum
from core.attention import Segments, SegmentsError, causal_attention
from core.bank import AdapterBank
from core.baselines.methods import apply_method, plan_method
from core.baselines.parts import SpecialTokens, special_tokens_of
from core.baselines.saved import Baseline, load_trained, trained_of
from core.certificate import Certificate, certify
from core.checkpoint import Checkpoint
from core.comparison import Comparison, MatrixComparison, Overlap, compare
from core.config import ALL_LINEAR, LoRAConfig, TrainConfig
from core.declarations import Config, Setting, read_json, setting, settings
from core.devices import (
    FRAMEWORK_BYTES,
    Gpu,
    device_memory,
    framework_bytes,
    gpus,
    is_of_memory,
    memory_bytes,
    memory_source,
    peak_memory_bytes,
    resolve_device,
    resolve_devices,
    resolve_dtype,
)
from core.distributed import World, is_lost
from core.errors import (
    AdapterFileError,
    CheckpointError,
    ExplodedGradientError,
    LoRAError,
    NonFiniteLossError,
    TargetError,
    cut,
    quoted,
)
from core.events import (
    Checkpointed,
    Evaluated,
    Event,
    Failed,
    Finished,
    Noted,
    Resumed,
    SpectrumMeasured,
    Started,
    Step,
    from_record,
    to_record,
)
from core.experts import LoRAExpert, LoRAExperts
from core.fused import LoRAFused, LoRASlice
from core.geometry import (
    Alignment,
    Amplification,
    alignment,
    amplification,
    basis_of,
    principal_angles,
    row_norms,
    similarity_null,
    subspace_similarity,
)
from core.inject import (
    eject,
    inject,
    injection_of,
    merge,
    merged_copy,
    method_of,
    strength,
    trained_in_full,
    unmerge,
)
from core.intruders import Intruders, damp, intruder_dimensions, shrink
from core.layers import LoRAConv, LoRAEmbedding, LoRALayer, LoRALinear
from core.losses import token_losses
from core.matrices import Factors, Layout
from core.memory import MemoryForecast, forecast_memory
from core.method import METHODS, MethodConfig
from core.recompute import recomputed
from core.rows import RowLabels, row_logits
from core.spectrum import Spectrum, random_sigma, spectra, spectrum
from core.targets import FORMS, Injection, Target, adaptable, chosen_ranks, fits_end, lora_layers, matrix_at, plan
from core.train import Training, evaluate, train
from core.weights import WeightSpectrum, WeightSVD, top_svd, weight_spectrum, weight_svd
