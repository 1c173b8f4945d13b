// The Python module: pointers come as integers, checked before by the Python side; no torch in sight.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu_backend.h"
#ifdef MIXCE_CUDA
#include "cuda/cuda_backend.h"
#endif
#include "params.h"

namespace py = pybind11;
using namespace mixce;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

RowParams row_params(uintptr_t logits, const RowLayout& logits_rows, uintptr_t targets, bool targets_int64,
                     int64_t rows, int64_t vocab_size, int dtype, int64_t ignore_index,
                     double label_smoothing, double z_loss, double softcap, double logit_scale,
                     uintptr_t grad_logits, const RowLayout& grad_rows, uintptr_t grad_loss,
                     int64_t grad_loss_stride, uintptr_t state, int threads, bool stream) {
  return {pointer<const void>(logits),
          logits_rows,
          pointer<const void>(targets),
          targets_int64,
          rows,
          vocab_size,
          static_cast<DType>(dtype),
          ignore_index,
          label_smoothing,
          z_loss,
          softcap,
          logit_scale,
          pointer<void>(grad_logits),
          grad_rows,
          pointer<const void>(grad_loss),
          grad_loss_stride,
          pointer<void>(state),
          threads,
          stream};
}

ForwardParams forward_params(uintptr_t eta, int64_t eta_stride, double eta_value, uintptr_t loss,
                             uintptr_t stats, uintptr_t correct) {
  return {pointer<const void>(eta), eta_stride,           eta_value,
          pointer<void>(loss),      pointer<void>(stats), pointer<bool>(correct)};
}

#ifdef MIXCE_CUDA
void define_cuda(py::module_& m) {
  py::class_<CudaLaunch>(m, "CudaLaunch")
      .def(py::init([](int device, uintptr_t stream, int parts, int shared_bytes, bool from_shared,
                       uintptr_t partials) {
        return CudaLaunch{device, stream, parts, shared_bytes, from_shared, partials};
      }));
  m.def("cuda_device", [](int index) {
    const CudaDevice device = cuda_device(index);
    return py::make_tuple(device.arch, device.code_arch, device.multiprocessors, device.shared_per_block,
                          device.shared_per_multiprocessor);
  });
  m.def("cuda_state_bytes", [](int dtype) { return cuda_state_bytes(static_cast<DType>(dtype)); });
  m.def("cuda_partial_bytes", [](int dtype) { return cuda_partial_bytes(static_cast<DType>(dtype)); });
  m.def("cuda_forward", &cuda_forward, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_logits_grad", &cuda_logits_grad, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_scale_rows", &cuda_scale_rows, py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native row kernels of mixce_kernels; see csrc/params.h for the arguments.";
  py::class_<RowLayout>(m, "RowLayout")
      .def(py::init([](int64_t inner, int64_t outer_stride, int64_t inner_stride) {
        return RowLayout{inner, outer_stride, inner_stride};
      }));
  py::class_<RowParams>(m, "RowParams").def(py::init(&row_params));
  py::class_<ForwardParams>(m, "ForwardParams").def(py::init(&forward_params));
  m.def("supported_isas", &supported_isas);
  m.def("cpu_forward", &cpu_forward, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_logits_grad", &cpu_logits_grad, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_scale_rows", &cpu_scale_rows, py::call_guard<py::gil_scoped_release>());
#ifdef MIXCE_CUDA
  define_cuda(m);
#endif
}
