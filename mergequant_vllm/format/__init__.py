"""THE CONTRACT between the quantizer, which writes it, and the server, which reads it: format 2.

A checkpoint is a Hugging Face folder whose `config.json` carries a `quantization_config` (class
`CheckpointFormat`). Its `targets`, in order, say which linears are quantized and how; a later
target overrides an earlier one, and what no target matches is not quantized. For each quantized
linear `P` the safetensors hold

| tensor                | shape           | dtype    | meaning                                   |
|-----------------------|-----------------|----------|-------------------------------------------|
| `P.weight_packed`     | [out, words(K)] | int32    | codes + 2^(b-1), see `packing`            |
| `P.weight_scale`      | [out, groups]   | bfloat16 | weight step of each channel, or of a run  |
| `P.weight_zero_point` | [out, groups]   | int8     | asymmetric only: in the codes' range      |
| `P.bias`              | [out]           | floating | only where the source model has one       |
| `P.output_offset`     | [out]           | see form | a constant that the server always adds    |
| `P.input_index`       | [K]             | int32    | static: gather of the norm's channels     |
| `P.input_offset`      | [K]             | float32  | static: added before rounding             |
| `P.input_clip`        | [1]             | float32  | dynamic: clip ratio of the token step     |

K is `columns` where the input was reconstructed (paper 4.2: strong channels repeated, others
dropped or permuted, and padding, whose codes equal the zero point), and the source model's `in`
elsewhere. `groups` is 1, ceil(K / group_size), or the number of segments. The linears that read one
norm hold equal copies of `input_index` and `input_offset`.

A static linear needs no step: it lives in the norm's multiplier, stored as norm / s, and in the
weight, quantized as W * s (paper 4.1, Eq. 4-5). Zero points of a static input need no arithmetic
either: `input_offset` holds -z/s, and `output_offset` the constant W z that it takes away. All
other tensors of the model are listed with their shapes under `tensors`, so that a missing, extra or
misshapen one is found by reading the headers alone.

What is to come enters without another version of what is here:

* LayerNorm: its adder is stored as beta / s under the norm's own name, in `tensors`; the linears
  behind it are static as behind an RMSNorm.
* Experts: a linear of each, `model.layers.{block}.mlp.experts.{expert}.down_proj`; `experts` will
  stand beside `blocks`, and the router, in 16 bits, absorbs s like any other reader of its norm.
* Codebooks of non-uniform weights: a field of `WeightForm` beside `bits`, and a tensor
  `P.weight_codebook [out, 2^b]` in the place of `P.weight_scale`.

| module       | what may be changed there                                     |
|--------------|---------------------------------------------------------------|
| `linear`     | what a linear can be like: its weight, input and constant     |
| `targets`    | patterns on names, and which linear a target matches          |
| `checkpoint` | the whole `quantization_config`, and reading it               |
| `tensors`    | what the files must hold for it, and the comparison with them |
"""

from mergequant_vllm.format.checkpoint import (
    BLOCK,
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointFormat,
    LinearEntry,
    Provenance,
    parse,
)
from mergequant_vllm.format.linear import (
    DynamicInput,
    FormatError,
    LinearForm,
    LinearFormat,
    StaticInput,
    WeightForm,
)
from mergequant_vllm.format.targets import Target, matches, shortest_targets
from mergequant_vllm.format.tensors import (
    StoredTensor,
    check_tensors,
    expected_tensors,
    stored_tensors,
)

__all__ = [
    "BLOCK",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "CheckpointFormat",
    "DynamicInput",
    "FormatError",
    "LinearEntry",
    "LinearForm",
    "LinearFormat",
    "Provenance",
    "StaticInput",
    "StoredTensor",
    "Target",
    "WeightForm",
    "check_tensors",
    "expected_tensors",
    "matches",
    "parse",
    "shortest_targets",
    "stored_tensors",
]
