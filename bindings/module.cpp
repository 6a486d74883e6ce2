// The Python module: build information and the objects that are no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include "accelrt/cpu_isa.h"
#include "accelrt/parallel.h"
#include "aten_products.h"
#include "blocks/feed_forward.h"
#include "kernel_launcher_bindings.h"
#include "memory.h"
#include "products_choice.h"

namespace py = pybind11;

namespace {

void torch_backend(int64_t begin, int64_t end, int64_t grain, accelrt::ParallelBody body,
                   void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [=](int64_t b, int64_t e) { body(b, e, context); });
}

py::dict build_info() {
  py::dict info;
#if defined(ACCELRT_RUNTIME_CUDA)
  info["cuda_kernels"] = "runtime";
#elif defined(ACCELRT_HAVE_CUDA)
  info["cuda_kernels"] = "nvcc";
#else
  info["cuda_kernels"] = "none";
#endif
#if defined(ACCELRT_HAVE_CUDA) && !defined(ACCELRT_RUNTIME_CUDA)
  info["cuda"] = true;
  info["cuda_compiler"] = ACCELRT_CUDA_COMPILER;
  info["cuda_architectures"] = ACCELRT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_compiler"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  info["compiler"] = ACCELRT_COMPILER;
  info["build_type"] = ACCELRT_BUILD_TYPE;
  info["torch_target"] = "2.11";
  info["torch_headers"] = ACCELRT_TORCH_VERSION;
#if defined(ACCELRT_HAVE_X86_ISA)
  info["cpu_isas"] =
      std::vector<std::string>{"generic", "avx2", "avx512", "avx512bf16", "amx_emulated", "amx"};
#else
  info["cpu_isas"] = std::vector<std::string>{"generic"};
#endif
  return info;
}

accelrt::DType dtype_of(const std::string& name) {
  if (name == "float32") return accelrt::DType::kFloat32;
  if (name == "bfloat16") return accelrt::DType::kBFloat16;
  ACCELRT_CHECK(name == "float16", "dtype is '", name, "'; allowed: float32, bfloat16, float16");
  return accelrt::DType::kFloat16;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  accelrt::set_parallel_backend(&torch_backend);
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def(
      "best_isa", [] { return accelrt::name_of(accelrt::best_isa()); },
      "The best instruction set of this processor that the build has.");
  m.def(
      "active_isa", [] { return accelrt::name_of(accelrt::active_isa()); },
      "The instruction set in use (see ACCELRT_CPU_ISA).");
  m.def("set_isa", &accelrt::set_isa, py::arg("name"),
        "Force an instruction set of build_info()['cpu_isas'] in this process.");
  m.def(
      "own_linear_is_faster",
      [](const std::string& dtype, int64_t depth) {
        return accelrt::bindings::own_linear_is_faster(dtype_of(dtype), depth);
      },
      py::arg("dtype"), py::arg("depth"),
      "Whether `linear` on the CPU is ahead of torch's for rows of `depth` elements.");
  m.def(
      "own_conv_is_faster",
      [](const std::string& dtype) {
        return accelrt::bindings::own_conv_is_faster(dtype_of(dtype));
      },
      py::arg("dtype"), "Whether `conv2d` on the CPU is ahead of torch's.");
  m.def(
      "own_attention_is_faster",
      [](const std::string& dtype, int64_t head_dim) {
        return accelrt::bindings::own_attention_is_faster(dtype_of(dtype), head_dim);
      },
      py::arg("dtype"), py::arg("head_dim"),
      "Whether `attention` on the CPU is ahead of torch's for this head dim.");
  m.def(
      "cuda_products", [] { return accelrt::bindings::own_cuda_products() ? "own" : "torch"; },
      "Who makes products and attention of CUDA tensors (see ACCELRT_CUDA_PRODUCTS).");
  m.def(
      "feed_forward_cache_bytes",
      [](bool cuda, const std::string& dtype) {
        return accelrt::feed_forward_cache_bytes(
            cuda ? accelrt::Device::kCUDA : accelrt::Device::kCPU, dtype_of(dtype));
      },
      py::arg("cuda"), py::arg("dtype"),
      "Scratch with which hidden activations stay in the cache.");
  m.def("set_cuda_products", &accelrt::bindings::set_cuda_products, py::arg("name"),
        "Force `torch` or `own` in this process.");
  accelrt::bindings::bind_memory(m);
  accelrt::bindings::bind_kernel_launcher(m);
}
