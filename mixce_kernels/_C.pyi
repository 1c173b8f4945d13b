"""The native extension: pointers as integers, strides in elements; see csrc/params.h."""

class RowLayout: ...
class TokenOptions: ...
class RowParams: ...
class ForwardCall: ...
class ReductionParams: ...

def row_layout(**fields: int) -> RowLayout: ...
def token_options(**fields: float | None) -> TokenOptions: ...
def row_params_of_shape(
    *,
    logits_rows: RowLayout,
    grad_rows: RowLayout,
    vocab_size: int,
    dtype: int,
    targets_int64: bool,
    options: TokenOptions,
) -> RowParams: ...
def row_params(
    others: RowParams,
    *,
    logits: int,
    targets: int,
    grad_logits: int,
    state: int,
    grad_loss: int,
    grad_loss_stride: int,
    token_scale: int,
    token_scale_stride: int,
) -> RowParams: ...
def forward_call_of_shape(
    *, rows: RowParams, upstream_stride: int, eta_stride: int, reduction: ReductionParams, reduces: bool
) -> ForwardCall: ...
def forward_call(
    shape: ForwardCall,
    *,
    logits: int,
    targets: int,
    grad_logits: int,
    upstream: int,
    eta: int,
    eta_value: float,
    weights: int,
    num_items: int,
    num_items_value: float,
    loss: int,
    token_scale: int,
    losses: int,
    state: int,
    stats: int,
    correct: int,
) -> ForwardCall: ...
def reduction_params(
    *,
    losses: int,
    number: int,
    targets: int,
    targets_int64: bool,
    dtype: int,
    ignore_index: int,
    sums: bool,
    mean: bool,
    weights: int,
    weights_stride: int,
    weights_dtype: int,
    num_items: int,
    num_items_dtype: int,
    num_items_value: float,
    loss: int,
    token_scale: int,
) -> ReductionParams: ...

class CpuLaunch: ...

def cpu_launch(*, isa: str, threads: int, streaming_stores: bool) -> CpuLaunch: ...
def supported_isas() -> list[str]: ...
def cpu_forward(call: ForwardCall, launch: CpuLaunch) -> int: ...
def cpu_reduce(params: ReductionParams) -> None: ...
def cpu_logits_grad(params: RowParams, launch: CpuLaunch) -> None: ...
def cpu_scale_rows(params: RowParams, launch: CpuLaunch) -> None: ...

# Only in an extension that was built with CUDA.

class CudaLaunch: ...

def cuda_launch(
    *, device: int, stream: int, parts: int, shared_bytes: int, from_shared: bool, partials: int
) -> CudaLaunch: ...
def cuda_device(device: int) -> tuple[int, int, int, int, int]: ...
def cuda_state_bytes(dtype: int) -> int: ...
def cuda_partial_bytes(dtype: int) -> int: ...
def cuda_forward(call: ForwardCall, launch: CudaLaunch) -> None: ...
def cuda_reduce(params: ReductionParams, launch: CudaLaunch) -> None: ...
def cuda_logits_grad(params: RowParams, launch: CudaLaunch) -> None: ...
def cuda_scale_rows(params: RowParams, launch: CudaLaunch) -> None: ...
