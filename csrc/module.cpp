// The Python module: pointers come as integers, checked before by the Python side; no torch in sight.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/cpu_backend.h"
#include "cpu/cpu_shards.h"
#ifdef MIXCE_CUDA
#include "cuda/cuda_backend.h"
#include "cuda/cuda_shards.h"
#endif
#include "params.h"

namespace py = pybind11;
using namespace mixce;

namespace {

// A member of a record, its name in Python, and the type in which its value comes from there.
template <typename Argument, typename Record, typename Value>
struct Field {
  const char* name;
  Value Record::* member;
};

template <typename Record, typename Value>
Field<Value, Record, Value> field(const char* name, Value Record::* member) {
  return {name, member};
}
template <typename Record, typename T>
Field<uintptr_t, Record, T*> field(const char* name, T* Record::* member) {
  return {name, member};
}
template <typename Record>
Field<int, Record, DType> field(const char* name, DType Record::* member) {
  return {name, member};
}
template <typename Record>
Field<int, Record, Weighting> field(const char* name, Weighting Record::* member) {
  return {name, member};
}
// A number that may be None, which becomes 0.
template <typename Record>
Field<std::optional<double>, Record, double> field_or_zero(const char* name, double Record::* member) {
  return {name, member};
}

template <typename Value>
void convert(const Value& argument, Value& value) {
  value = argument;
}
template <typename T>
void convert(uintptr_t argument, T*& value) {
  value = reinterpret_cast<T*>(argument);
}
void convert(int argument, DType& value) { value = static_cast<DType>(argument); }
void convert(int argument, Weighting& value) { value = static_cast<Weighting>(argument); }
void convert(const std::optional<double>& argument, double& value) { value = argument.value_or(0); }

// A record, and the function that makes it from keyword arguments, one a field. A function, because a call of
// a class takes half a microsecond longer.
template <typename Record, typename... Arguments, typename... Values>
void define_record(py::module_& m, const char* name, const char* function,
                   Field<Arguments, Record, Values>... fields) {
  py::class_<Record>(m, name);
  m.def(
      function,
      [fields...](Arguments... arguments) {
        Record record{};
        (convert(arguments, record.*fields.member), ...);
        return record;
      },
      py::kw_only(), py::arg(fields.name)...);
}

// A function that makes a record of another one, with new values of these fields.
template <typename Record, typename... Arguments, typename... Values>
void define_copy(py::module_& m, const char* function, Field<Arguments, Record, Values>... fields) {
  m.def(
      function,
      [fields...](const Record& others, Arguments... arguments) {
        Record record = others;
        (convert(arguments, record.*fields.member), ...);
        return record;
      },
      py::arg("others"), py::kw_only(), py::arg(fields.name)...);
}

void define_params(py::module_& m) {
  define_record(m, "RowLayout", "row_layout", field("number", &RowLayout::number),
                field("inner", &RowLayout::inner), field("outer_stride", &RowLayout::outer_stride),
                field("inner_stride", &RowLayout::inner_stride));
  define_record(m, "TokenOptions", "token_options", field("ignore_index", &TokenOptions::ignore_index),
                field("label_smoothing", &TokenOptions::label_smoothing),
                field("z_loss", &TokenOptions::z_loss), field_or_zero("softcap", &TokenOptions::softcap),
                field("logit_scale", &TokenOptions::logit_scale));
  define_record(m, "RowParams", "row_params_of_shape", field("logits_rows", &RowParams::logits_rows),
                field("grad_rows", &RowParams::grad_rows), field("vocab_size", &RowParams::vocab_size),
                field("dtype", &RowParams::dtype), field("targets_int64", &RowParams::targets_int64),
                field("options", &RowParams::options));
  define_copy(m, "row_params", field("logits", &RowParams::logits), field("targets", &RowParams::targets),
              field("grad_logits", &RowParams::grad_logits), field("grad_loss", &RowParams::grad_loss),
              field("grad_loss_stride", &RowParams::grad_loss_stride),
              field("token_scale", &RowParams::token_scale),
              field("token_scale_stride", &RowParams::token_scale_stride), field("state", &RowParams::state));
  // What a call of log-probabilities has besides, on the record itself: the losses' calls do without.
  m.def(
      "add_logprobs",
      [](RowParams& rows, uintptr_t temperature, uintptr_t entropy_state, uintptr_t grad_entropy,
         int64_t grad_entropy_stride) {
        convert(temperature, rows.temperature);
        convert(entropy_state, rows.entropy_state);
        convert(grad_entropy, rows.grad_entropy);
        rows.grad_entropy_stride = grad_entropy_stride;
      },
      py::arg("rows"), py::kw_only(), py::arg("temperature"), py::arg("entropy_state"),
      py::arg("grad_entropy"), py::arg("grad_entropy_stride"));
  define_record(m, "ReductionParams", "reduction_params", field("losses", &ReductionParams::losses),
                field("number", &ReductionParams::number), field("targets", &ReductionParams::targets),
                field("targets_int64", &ReductionParams::targets_int64),
                field("dtype", &ReductionParams::dtype),
                field("ignore_index", &ReductionParams::ignore_index), field("sums", &ReductionParams::sums),
                field("mean", &ReductionParams::mean), field("weights", &ReductionParams::weights),
                field("weights_stride", &ReductionParams::weights_stride),
                field("weights_dtype", &ReductionParams::weights_dtype),
                field("num_items", &ReductionParams::num_items),
                field("num_items_dtype", &ReductionParams::num_items_dtype),
                field("num_items_value", &ReductionParams::num_items_value),
                field("loss", &ReductionParams::loss), field("token_scale", &ReductionParams::token_scale));
}

// What a forward has of its sizes and options, and the call that this makes of its tensors.
void define_forward(py::module_& m) {
  py::class_<ForwardCall>(m, "ForwardCall").def_readwrite("rows", &ForwardCall::rows);
  m.def(
      "forward_call_of_shape",
      [](const RowParams& rows, int64_t upstream_stride, int64_t eta_stride, const ReductionParams& reduction,
         bool reduces) {
        ForwardCall call{rows, {}, reduction, reduces};
        call.rows.token_scale_stride = upstream_stride;
        call.results.eta_stride = eta_stride;
        return call;
      },
      py::kw_only(), py::arg("rows"), py::arg("upstream_stride"), py::arg("eta_stride"), py::arg("reduction"),
      py::arg("reduces"));
  m.def(
      "forward_call",
      [](const ForwardCall& shape, uintptr_t logits, uintptr_t targets, uintptr_t grad_logits,
         uintptr_t upstream, uintptr_t eta, double eta_value, int weighting, uintptr_t parameters,
         double first, double second, uintptr_t weights, uintptr_t num_items, double num_items_value,
         uintptr_t loss, uintptr_t token_scale, uintptr_t losses, uintptr_t state, uintptr_t stats,
         uintptr_t correct) {
        ForwardCall call = shape;
        convert(logits, call.rows.logits);
        convert(targets, call.rows.targets);
        convert(grad_logits, call.rows.grad_logits);
        convert(upstream, call.rows.token_scale);
        convert(state, call.rows.state);
        convert(eta, call.results.eta);
        call.results.eta_value = eta_value;
        convert(weighting, call.results.weighting);
        convert(parameters, call.results.parameters);
        call.results.first = first, call.results.second = second;
        convert(losses, call.results.losses);
        convert(stats, call.results.stats);
        convert(correct, call.results.correct);
        convert(losses, call.reduction.losses);
        convert(targets, call.reduction.targets);
        convert(weights, call.reduction.weights);
        convert(num_items, call.reduction.num_items);
        call.reduction.num_items_value = num_items_value;
        convert(loss, call.reduction.loss);
        convert(token_scale, call.reduction.token_scale);
        return call;
      },
      py::arg("shape"), py::kw_only(), py::arg("logits"), py::arg("targets"), py::arg("grad_logits"),
      py::arg("upstream"), py::arg("eta"), py::arg("eta_value"), py::arg("weighting"), py::arg("parameters"),
      py::arg("first"), py::arg("second"), py::arg("weights"), py::arg("num_items"),
      py::arg("num_items_value"), py::arg("loss"), py::arg("token_scale"), py::arg("losses"),
      py::arg("state"), py::arg("stats"), py::arg("correct"));
}

void define_shards(py::module_& m) {
  define_record(m, "ForwardParams", "forward_params", field("eta", &ForwardParams::eta),
                field("eta_stride", &ForwardParams::eta_stride),
                field("eta_value", &ForwardParams::eta_value), field("weighting", &ForwardParams::weighting),
                field("parameters", &ForwardParams::parameters), field("first", &ForwardParams::first),
                field("second", &ForwardParams::second), field("losses", &ForwardParams::losses),
                field("stats", &ForwardParams::stats), field("correct", &ForwardParams::correct));
  define_record(m, "Columns", "columns", field("start", &Columns::start), field("number", &Columns::number));
  define_record(m, "LocalTargets", "local_targets", field("columns", &LocalTargets::columns),
                field("ignored", &LocalTargets::ignored), field("elsewhere", &LocalTargets::elsewhere),
                field("local", &LocalTargets::local));
  define_record(m, "ShardMessage", "shard_message", field("columns", &ShardMessage::columns),
                field("digest", &ShardMessage::digest), field("with_stats", &ShardMessage::with_stats),
                field("largest_state", &ShardMessage::largest_state),
                field("message", &ShardMessage::message));
  define_record(m, "Messages", "messages", field("messages", &Messages::messages),
                field("ranks", &Messages::ranks), field("length", &Messages::length));
}

void define_cpu(py::module_& m) {
  define_record(m, "CpuLaunch", "cpu_launch", field("isa", &CpuLaunch::isa),
                field("threads", &CpuLaunch::threads),
                field("streaming_stores", &CpuLaunch::streaming_stores));
  m.def("supported_isas", &supported_isas);
  m.def("cpu_features", &cpu_features);
  m.def("cpu_forward", &cpu_forward, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_reduce", &cpu_reduce, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_logits_grad", &cpu_logits_grad, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_scale_rows", &cpu_scale_rows, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_localize_targets", &cpu_localize_targets, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_write_message", &cpu_write_message, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_merge_messages", &cpu_merge_messages, py::call_guard<py::gil_scoped_release>());
}

#ifdef MIXCE_CUDA
void define_cuda(py::module_& m) {
  define_record(m, "CudaLaunch", "cuda_launch", field("device", &CudaLaunch::device),
                field("stream", &CudaLaunch::stream), field("parts", &CudaLaunch::parts),
                field("shared_bytes", &CudaLaunch::shared_bytes),
                field("from_shared", &CudaLaunch::from_shared), field("partials", &CudaLaunch::partials));
  m.def("cuda_device", [](int index) {
    const CudaDevice device = cuda_device(index);
    return py::make_tuple(device.arch, device.code_arch, device.multiprocessors, device.shared_per_block,
                          device.shared_per_multiprocessor);
  });
  m.def("cuda_state_bytes", [](int dtype) { return cuda_state_bytes(static_cast<DType>(dtype)); });
  m.def("cuda_partial_bytes", [](int dtype) { return cuda_partial_bytes(static_cast<DType>(dtype)); });
  m.def("cuda_forward", &cuda_forward, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_reduce", &cuda_reduce, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_logits_grad", &cuda_logits_grad, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_scale_rows", &cuda_scale_rows, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_localize_targets", &cuda_localize_targets, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_write_message", &cuda_write_message, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_merge_messages", &cuda_merge_messages, py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native row kernels of mixce_kernels; see csrc/params.h for the records.";
  define_params(m);
  define_forward(m);
  define_shards(m);
  define_cpu(m);
#ifdef MIXCE_CUDA
  define_cuda(m);
#endif
}
