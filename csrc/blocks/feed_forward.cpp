#include "blocks/feed_forward.h"

#include <algorithm>

#include "accelrt/cpu_isa.h"
#include "blocks/views.h"
#include "runtime/device_info.h"

namespace accelrt {
namespace {

using namespace blocks;

constexpr const char* kOp = "feed_forward";

int64_t hidden_columns(const FeedForwardParams& p) { return p.layers.in.weight.size[0]; }

int64_t scratch_of(const FeedForwardParams& p, int64_t rows, int64_t columns) {
  return aligned(rows * columns * size_of(p.x.dtype));
}

// Hidden activations, and with `add` the rows of y for products that do not add by themselves.
int64_t scratch_of(const FeedForwardParams& p, int64_t rows) {
  const int64_t sums = p.add ? scratch_of(p, rows, p.layers.out.weight.size[0]) : 0;
  return scratch_of(p, rows, hidden_columns(p)) + sums;
}

void check_matrix(const char* name, const TensorView& t, int64_t rows, int64_t columns,
                  const TensorView& like) {
  check_same_type(kOp, name, t, like);
  ACCELRT_CHECK(t.ndim == 2 && t.size[0] == rows && t.size[1] == columns, kOp, ": ", name,
                " is not of shape [", rows, ", ", columns, "]");
  check_unit_stride(kOp, name, t);
}

void check_bias(const char* name, const OptionalView& bias, int64_t columns,
                const TensorView& like) {
  if (!bias) return;
  check_same_type(kOp, name, *bias, like);
  ACCELRT_CHECK(bias->ndim == 1 && bias->size[0] == columns, kOp, ": ", name, " is not of shape [",
                columns, "]");
  check_unit_stride(kOp, name, *bias);
}

LinearEpilogue epilogue_of(HiddenActivation kind) {
  switch (kind) {
    case HiddenActivation::kGELU: return LinearEpilogue::kGELU;
    case HiddenActivation::kGELUTanh: return LinearEpilogue::kGELUTanh;
    case HiddenActivation::kGEGLU: return LinearEpilogue::kGEGLU;
    case HiddenActivation::kGEGLUTanh: return LinearEpilogue::kGEGLUTanh;
  }
  ACCELRT_CHECK(false, kOp, ": unknown activation ", static_cast<int>(kind));
}

// Rows [begin, begin + count): of one sample, or of whole ones.
void run_slice(const FeedForwardParams& p, Products& products, Stream stream, int64_t begin,
               int64_t count) {
  const FeedForward& ff = p.layers;
  const int64_t width = ff.out.weight.size[0];
  TensorView hidden = contiguous(p.scratch, p.x, {count, hidden_columns(p)});
  Epilogue activate;
  activate.kind = epilogue_of(ff.activation);
  if (is_geglu(ff.activation)) {
    activate.scratch = hidden;
    hidden = narrowed(hidden, 1, 0, hidden.size[1] / 2);
  }
  products.linear(narrowed(p.x, 0, begin, count), ff.in.weight, ff.in.bias, activate, hidden,
                  stream);
  Epilogue last;
  if (p.add) {
    last.kind = LinearEpilogue::kGatedResidual;
    char* const sums =
        static_cast<char*>(p.scratch) + scratch_of(p, feed_forward_slice(p), hidden_columns(p));
    last.scratch = contiguous(sums, p.x, {count, width});
    if (p.gate) {
      const int64_t samples = (count + p.rows_per_sample - 1) / p.rows_per_sample;
      last.gate = narrowed(*p.gate, 0, begin / p.rows_per_sample, samples);
      last.rows_per_sample = std::min(count, p.rows_per_sample);
    }
  }
  products.linear(hidden, ff.out.weight, ff.out.bias, last, narrowed(p.out, 0, begin, count),
                  stream);
}

}  // namespace

void check(const FeedForwardParams& p) {
  const FeedForward& ff = p.layers;
  for (const TensorView* t : {&p.x, &ff.in.weight, &ff.out.weight}) {
    ACCELRT_CHECK(t->ndim == 2, kOp, ": x or a weight has ", t->ndim, " dimensions, expected 2");
  }
  const int64_t rows = p.x.size[0];
  const int64_t wide = hidden_columns(p);
  const int64_t width = ff.out.weight.size[0];
  epilogue_of(ff.activation);
  ACCELRT_CHECK(!is_geglu(ff.activation) || wide % 2 == 0, kOp, ": the first weight has ", wide,
                " rows; geglu needs an even number");
  check_matrix("x", p.x, rows, p.x.size[1], p.x);
  check_matrix("the first weight", ff.in.weight, wide, p.x.size[1], p.x);
  check_matrix("the second weight", ff.out.weight, width, is_geglu(ff.activation) ? wide / 2 : wide,
               p.x);
  check_bias("the first bias", ff.in.bias, wide, p.x);
  check_bias("the second bias", ff.out.bias, width, p.x);
  check_matrix("out", p.out, rows, width, p.x);
  ACCELRT_CHECK(ff.rows >= 0, kOp, ": rows is ", ff.rows, ", expected 0 or more");
  ACCELRT_CHECK(!p.gate || p.add, kOp, ": a gate without a sum");
  if (!p.gate) return;
  ACCELRT_CHECK(p.rows_per_sample >= 1 && rows % p.rows_per_sample == 0, kOp, ": ",
                p.rows_per_sample, " rows per sample do not divide the ", rows, " rows");
  check_matrix("gate", *p.gate, rows / p.rows_per_sample, width, p.x);
}

int64_t feed_forward_slice(const FeedForwardParams& p) {
  const int64_t rows = p.x.size[0];
  const int64_t wanted = p.layers.rows <= 0 ? rows : std::min(p.layers.rows, rows);
  // A slice has one gate, or one for each of its samples.
  if (!p.gate || wanted < p.rows_per_sample) return wanted;
  return wanted / p.rows_per_sample * p.rows_per_sample;
}

int64_t feed_forward_scratch_bytes(const FeedForwardParams& p) {
  return scratch_of(p, feed_forward_slice(p));
}

int64_t feed_forward_rows(const FeedForwardParams& p, int64_t bytes) {
  const int64_t per_row = std::max<int64_t>(
      size_of(p.x.dtype) * (hidden_columns(p) + (p.add ? p.layers.out.weight.size[0] : 0)), 1);
  int64_t most = bytes / per_row;
  while (most > 0 && scratch_of(p, most) > bytes) --most;  // less than two alignments
  const int64_t rows = p.x.size[0];
  if (most <= 0 || most >= rows) return std::min(most, rows);
  const int64_t slices = (rows + most - 1) / most;
  return (rows + slices - 1) / slices;
}

int64_t feed_forward_cache_bytes(Device device, DType dtype) {
  if (device != Device::kCPU) return current_device_info().l2_bytes / 2;
  // The products on tile registers are so fast that every slice's packing of weights counts.
  constexpr int64_t kTiles = 64 << 20;
  constexpr int64_t kCPU = 8 << 20;
  return dtype == DType::kBFloat16 && active_isa() == Isa::kAMX ? kTiles : kCPU;
}

void feed_forward(const FeedForwardParams& p, Products& products, Stream stream) {
  check(p);
  const int64_t rows = p.x.size[0];
  if (p.out.numel() == 0) return;
  const int64_t needed = feed_forward_scratch_bytes(p);
  ACCELRT_CHECK(p.scratch_bytes >= needed, kOp, ": the scratch has ", p.scratch_bytes,
                " bytes, expected at least ", needed);
  const int64_t step = feed_forward_slice(p);
  const bool by_sample = p.gate && step < p.rows_per_sample;
  for (int64_t begin = 0; begin < rows;) {
    const int64_t limit = by_sample ? (begin / p.rows_per_sample + 1) * p.rows_per_sample : rows;
    const int64_t count = std::min(step, limit - begin);
    run_slice(p, products, stream, begin, count);
    begin += count;
  }
}

}  // namespace accelrt
