#include "aten_products.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>
#include <utility>

#include "accelrt/cpu_isa.h"
#include "kernels/activation/activation.h"
#include "kernels/attention/attention.h"
#include "kernels/geglu/geglu.h"
#include "kernels/residual_blend/residual_blend.h"
#include "products_choice.h"

// Since torch 2.13: what went wrong in the last call. Weak, so that this object loads under 2.11.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace accelrt::bindings {
namespace {

using torch::stable::detail::from;

// The first result, if the operator has one.
template <size_t N>
StableIValue call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) !=
      AOTI_TORCH_SUCCESS) {
    const bool known = torch_exception_get_what_without_backtrace != nullptr;
    ACCELRT_CHECK(false, name, " failed",
                  known ? std::string(": ") + torch_exception_get_what_without_backtrace() : "");
  }
  return stack[0];
}

// An operator that returns its `out`: the reference is given back.
template <size_t N>
void call_out(const char* name, const char* overload, const std::array<StableIValue, N>& stack) {
  torch::stable::detail::to<Tensor>(call(name, overload, stack));
}

}  // namespace

Tensor AtenProducts::tensor_of(const TensorView& view) const {
  const auto n = static_cast<size_t>(view.ndim);
  return torch::stable::from_blob(view.data, {view.size, n}, {view.stride, n}, device_, dtype_);
}

OptionalTensor AtenProducts::tensor_of(const OptionalView& view) const {
  if (!view) return std::nullopt;
  return tensor_of(*view);
}

void AtenProducts::plain_linear(const TensorView& x, const TensorView& weight,
                                const OptionalView& bias, const TensorView& out) const {
  call_out<4>(
      "aten::linear", "out",
      {from(tensor_of(x)), from(tensor_of(weight)), from(tensor_of(bias)), from(tensor_of(out))});
}

void AtenProducts::linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                          const Epilogue& epilogue, const TensorView& out, Stream stream) {
  switch (epilogue.kind) {
    case LinearEpilogue::kNone: plain_linear(x, weight, bias, out); return;
    case LinearEpilogue::kGELU:
    case LinearEpilogue::kGELUTanh:
      plain_linear(x, weight, bias, out);
      accelrt::activation(out, std::nullopt,
                          epilogue.kind == LinearEpilogue::kGELU ? ActivationKind::kGELU
                                                                 : ActivationKind::kGELUTanh,
                          out, stream);
      return;
    case LinearEpilogue::kGEGLU:
    case LinearEpilogue::kGEGLUTanh:
      plain_linear(x, weight, bias, epilogue.scratch);
      accelrt::geglu(epilogue.scratch, std::nullopt,
                     epilogue.kind == LinearEpilogue::kGEGLU ? ActivationKind::kGELU
                                                             : ActivationKind::kGELUTanh,
                     out, stream);
      return;
    case LinearEpilogue::kGatedResidual: break;
  }
  // Not addcmul: the stable ABI cannot pass its Scalar.
  const TensorView& y = epilogue.scratch;
  plain_linear(x, weight, bias, y);
  if (epilogue.gate) {
    TensorView by_sample = y;  // [M, N] -> [B, rows of a sample, N]
    by_sample.ndim = 3;
    by_sample.size[0] = y.size[0] / epilogue.rows_per_sample;
    by_sample.size[1] = epilogue.rows_per_sample;
    by_sample.size[2] = y.size[1];
    by_sample.stride[0] = y.stride[0] * epilogue.rows_per_sample;
    by_sample.stride[1] = y.stride[0];
    by_sample.stride[2] = y.stride[1];
    TensorView gate = *epilogue.gate;  // [B, N] -> [B, 1, N]
    gate.ndim = 3;
    gate.size[2] = gate.size[1];
    gate.stride[2] = gate.stride[1];
    gate.size[1] = 1;
    const Tensor target = tensor_of(by_sample);
    call_out<3>("aten::mul", "out", {from(target), from(tensor_of(gate)), from(target)});
  }
  accelrt::residual_blend(out, y, std::nullopt, 1.f, out, stream);
}

void AtenProducts::attention(const TensorView& q, const TensorView& k, const TensorView& v,
                             const OptionalView& bias, double scale, const TensorView& out,
                             Stream) {
  const auto heads_first = [&](TensorView t) {  // [B, S, H, D] -> [B, H, S, D]
    std::swap(t.size[1], t.size[2]);
    std::swap(t.stride[1], t.stride[2]);
    return tensor_of(t);
  };
  const auto mixed = torch::stable::detail::to<Tensor>(call<8>(
      "aten::scaled_dot_product_attention", "",
      {from(heads_first(q)), from(heads_first(k)), from(heads_first(v)), from(tensor_of(bias)),
       from(0.0), from(false), from(std::optional<double>(scale)), from(false)}));
  Tensor target = heads_first(out);
  torch::stable::copy_(target, mixed);
}

namespace {

// oneDNN uses the tile registers wherever they are: without them our bfloat16 products are behind.
bool has_best_bfloat16() {
  const Isa isa = active_isa();
  return isa >= Isa::kAVX512BF16 && (isa > Isa::kAVX512BF16 || best_isa() == Isa::kAVX512BF16);
}

// MKL, which has torch's float32 products, is at its best on the processors of its maker.
bool mkl_is_at_home() {
#if defined(ACCELRT_HAVE_X86_ISA)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

// On the tile registers ours is about equal to oneDNN's that packs at every call, and has
// epilogues. On Zen 4, against oneDNN and MKL: bfloat16 205 to 215 GFLOP/s for 180 to 208, float32
// 93 for 80 up to here and 80 for 90 at a depth of 4608, float16 98 for 21.
constexpr int64_t kMaxFloatDepth = 2304;

// torch has bfloat16 products only with AVX-512: on Zen 3 its linear runs at 10 GFLOP/s for 60 of
// ours, its convolutions at 10 (0.7 unless channels-last) for 120, where 2048^3 in float32 has 133.
bool torch_has_no_bfloat16() { return active_isa() == Isa::kAVX2 && best_isa() == Isa::kAVX2; }

// Nor float16 without the instructions of AVX512-FP16.
bool torch_has_float16() {
#if defined(ACCELRT_HAVE_X86_ISA)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512fp16") > 0;
#else
  return false;
#endif
}

bool own_linear_is_faster(DType dtype, int64_t depth) {
  switch (dtype) {
    case DType::kBFloat16: return has_best_bfloat16() || torch_has_no_bfloat16();
    case DType::kFloat16:
      return active_isa() >= Isa::kAVX512 || (active_isa() == Isa::kAVX2 && !torch_has_float16());
    case DType::kFloat32:
      return active_isa() >= Isa::kAVX512 && depth <= kMaxFloatDepth && !mkl_is_at_home();
  }
  return false;
}

// On the tile registers: 0.75 to 1.1 of a 2048^3 product, where oneDNN's has 0.3 to 1.15, the more
// the larger the images. With products of pairs alone 0.65 to 1.1, and 0.4 to 1.1.
bool own_conv_is_faster(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return torch_has_no_bfloat16() || active_isa() == Isa::kAMX ||
             (active_isa() == Isa::kAVX512BF16 && best_isa() == Isa::kAVX512BF16);
    case DType::kFloat16: return active_isa() >= Isa::kAVX2 && !torch_has_float16();
    case DType::kFloat32: return false;
  }
  return false;
}

bool own_cuda_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                     LinearEpilogue epilogue, const OptionalView& gate, int64_t rows_per_sample,
                     const TensorView& out, Stream stream) {
  if (x.device != Device::kCUDA || !own_cuda_products()) return false;
  if (!linear_cuda_takes(linear_params(x, weight, bias, epilogue, gate, rows_per_sample, out))) {
    return false;
  }
  accelrt::linear(x, weight, bias, epilogue, gate, rows_per_sample, out, stream);
  return true;
}

bool own_attention_is_faster(DType dtype, int64_t head_dim) {
  if (head_dim > kMaxAttentionDim) return false;
  switch (dtype) {
    case DType::kBFloat16: return has_best_bfloat16() || torch_has_no_bfloat16();
    case DType::kFloat16: return active_isa() >= Isa::kAVX2;
    case DType::kFloat32: return active_isa() >= Isa::kAVX512;
  }
  return false;
}

bool own_cuda_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                        const OptionalView& bias, double scale, const TensorView& out,
                        Stream stream) {
  if (q.device != Device::kCUDA || !own_cuda_products()) return false;
  if (!attention_cuda_takes(attention_params(q, k, v, bias, scale, out))) return false;
  accelrt::attention(q, k, v, bias, scale, out, stream);
  return true;
}

void FastestProducts::linear(const TensorView& x, const TensorView& weight,
                             const OptionalView& bias, const Epilogue& epilogue,
                             const TensorView& out, Stream stream) {
  if (x.device == Device::kCPU && own_linear_is_faster(x.dtype, x.size[1])) {
    accelrt::linear(x, weight, bias, epilogue.kind, epilogue.gate, epilogue.rows_per_sample, out);
  } else if (!own_cuda_linear(x, weight, bias, epilogue.kind, epilogue.gate,
                              epilogue.rows_per_sample, out, stream)) {
    AtenProducts::linear(x, weight, bias, epilogue, out, stream);
  }
}

void FastestProducts::attention(const TensorView& q, const TensorView& k, const TensorView& v,
                                const OptionalView& bias, double scale, const TensorView& out,
                                Stream stream) {
  if (q.device == Device::kCPU && own_attention_is_faster(q.dtype, q.size[3])) {
    accelrt::attention(q, k, v, bias, scale, out, stream);
  } else if (!own_cuda_attention(q, k, v, bias, scale, out, stream)) {
    AtenProducts::attention(q, k, v, bias, scale, out, stream);
  }
}

}  // namespace accelrt::bindings
