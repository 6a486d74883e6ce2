#include "blocks/transformer_block.h"

#include <algorithm>

#include "blocks/views.h"
#include "kernels/layer_norm/layer_norm.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "transformer_block";

using namespace blocks;

// ---- Sizes ------------------------------------------------------------------------------------

struct Shape {
  int64_t batch, length, width;  // B, S, D
  int64_t rows;                  // B * S
  int64_t inner;                 // of self-attention: heads * head dim
  int64_t head_step;             // heads of one slice
  int64_t slice_columns;         // of the keys of one slice
  int64_t cross_inner = 0;
  int64_t keys = 0;  // L of a context that is projected here
  int64_t hidden;    // columns of the first product of the feed-forward
  int64_t ff_rows;   // rows of the longest piece
  int64_t element;   // bytes

  explicit Shape(const TransformerBlockParams& p) {
    batch = p.stream.size[0];
    length = p.stream.size[1];
    width = p.stream.size[2];
    rows = batch * length;
    inner = p.attention.out.weight.size[1];
    const int64_t heads = std::max<int64_t>(p.attention.heads, 1);
    head_step = p.heads_per_slice <= 0 ? heads : std::min(p.heads_per_slice, heads);
    slice_columns = inner / heads * head_step;
    if (p.cross) {
      cross_inner = p.cross->weights.q.weight.size[0];
      if (p.cross->context) keys = p.cross->context->size[1];
    }
    hidden = p.feed_forward.in.weight.size[0];
    const int64_t wanted = p.feed_forward.rows <= 0 ? rows : std::min(p.feed_forward.rows, rows);
    // Pieces are whole samples, or tokens of one sample: each has one gate or one per sample.
    ff_rows = wanted >= length ? wanted / std::max<int64_t>(length, 1) * length : wanted;
    element = size_of(p.stream.dtype);
  }

  bool by_heads() const { return slice_columns < inner; }
  int64_t bytes(int64_t count, int64_t columns) const { return aligned(count * columns * element); }
};

// Byte offsets into the workspace. Four parts of one size lie one after the other:
//
//   part         self-attention          cross-attention   feed-forward
//   0            queries, then y         queries, then y   its normed input
//   1            keys                    mixed             hidden rows, y of the rows
//   2            values                  keys and values    (beginning at part 1)
//   3            normed, then mixed       (beginning at part 2)
//
// With heads in slices part 0 has the queries of all heads, over which they are mixed, part 1 the
// normed input, then y, and the keys and values of a slice follow.
//
// y is what a sub-layer adds to the stream.
struct Layout {
  int64_t part;
  int64_t slice_keys, slice_values;
  int64_t context_keys, context_values;
  int64_t hidden;
  int64_t total;

  explicit Layout(const Shape& s) {
    part = s.bytes(s.rows, std::max({s.width, s.inner, s.cross_inner}));
    const int64_t projected = s.bytes(s.batch * s.keys, s.cross_inner);
    context_keys = 2 * part;
    context_values = context_keys + projected;
    hidden = part;
    const int64_t ff_end = hidden + s.bytes(s.ff_rows, s.hidden) + s.bytes(s.ff_rows, s.width);
    const int64_t slice = s.bytes(s.rows, s.slice_columns);
    slice_keys = 2 * part;
    slice_values = slice_keys + slice;
    const int64_t attention_end = s.by_heads() ? slice_values + slice : 4 * part;
    total = std::max({attention_end, context_values + projected, ff_end});
  }
};

// ---- Checks -----------------------------------------------------------------------------------

void check_linear(const char* name, const LinearWeights& w, int64_t rows, int64_t columns,
                  const TensorView& like) {
  check_same_type(kOp, name, w.weight, like);
  ACCELRT_CHECK(w.weight.ndim == 2 && w.weight.size[0] == rows && w.weight.size[1] == columns, kOp,
                ": the weight of ", name, " is not of shape [", rows, ", ", columns, "]");
  ACCELRT_CHECK(w.weight.numel() == 0 || ((columns == 1 || w.weight.stride[1] == 1) &&
                                          (rows == 1 || w.weight.stride[0] == columns)),
                kOp, ": the weight of ", name, " is not contiguous");
  if (!w.bias) return;
  check_same_type(kOp, name, *w.bias, like);
  ACCELRT_CHECK(w.bias->ndim == 1 && w.bias->size[0] == rows, kOp, ": the bias of ", name,
                " is not of shape [", rows, "]");
  check_unit_stride(kOp, name, *w.bias);
}

void check_mask(const char* name, const AttentionWeights& a, const Shape& s, int64_t keys,
                const TensorView& like) {
  if (!a.mask) return;
  check_same_type(kOp, name, *a.mask, like);
  const int64_t full[] = {s.batch, a.heads, s.length, keys};
  ACCELRT_CHECK(a.mask->ndim == 4, kOp, ": ", name, " has ", a.mask->ndim,
                " dimensions, expected 4");
  for (int d = 0; d < 4; ++d) {
    ACCELRT_CHECK(a.mask->size[d] == full[d] || (d < 3 && a.mask->size[d] == 1), kOp, ": ", name,
                  " has size ", a.mask->size[d], " in dimension ", d, ", expected ", full[d]);
  }
  check_unit_stride(kOp, name, *a.mask);
}

void check_heads(const char* name, int64_t inner, int64_t heads) {
  ACCELRT_CHECK(heads >= 1 && inner % heads == 0, kOp, ": the ", heads, " heads of ", name,
                " do not divide its ", inner, " channels");
}

void check_cross(const CrossAttention& cross, const Shape& s, const TensorView& like) {
  const AttentionWeights& w = cross.weights;
  ACCELRT_CHECK(w.q.weight.ndim == 2, kOp, ": the weight of cross q is no matrix");
  check_linear("cross q", w.q, s.cross_inner, s.width, like);
  check_linear("cross out", w.out, s.width, s.cross_inner, like);
  check_heads("cross-attention", s.cross_inner, w.heads);
  const bool given = cross.keys.has_value();
  ACCELRT_CHECK(given == cross.values.has_value() && given != cross.context.has_value(), kOp,
                ": cross-attention takes a context, or keys and values");
  int64_t keys = 0;
  if (given) {
    for (const auto* t : {&*cross.keys, &*cross.values}) {
      check_same_type(kOp, "keys and values", *t, like);
      ACCELRT_CHECK(t->ndim == 4 && t->size[0] == s.batch && t->size[1] == cross.keys->size[1] &&
                        t->size[2] == w.heads && t->size[3] * w.heads == s.cross_inner,
                    kOp, ": keys and values are not of shape [", s.batch, ", L, ", w.heads, ", ",
                    s.cross_inner / w.heads, "]");
      check_unit_stride(kOp, "keys and values", *t);
    }
    keys = cross.keys->size[1];
  } else {
    const TensorView& context = *cross.context;
    check_same_type(kOp, "context", context, like);
    ACCELRT_CHECK(context.ndim == 3 && context.size[0] == s.batch, kOp, ": context is not of shape",
                  " [", s.batch, ", L, E]");
    check_unit_stride(kOp, "context", context);
    keys = context.size[1];
    ACCELRT_CHECK(keys <= 1 || s.batch <= 1 || context.stride[0] == keys * context.stride[1], kOp,
                  ": the samples of context do not follow each other");
    ACCELRT_CHECK(w.k && w.v, kOp, ": a context needs the weights of k and v");
    check_linear("cross k", *w.k, s.cross_inner, context.size[2], like);
    check_linear("cross v", *w.v, s.cross_inner, context.size[2], like);
  }
  ACCELRT_CHECK(keys >= 1, kOp, ": the context has no tokens");
  check_mask("cross mask", w, s, keys, like);
}

// ---- The forward ------------------------------------------------------------------------------

class Forward {
 public:
  Forward(const TransformerBlockParams& p, Products& products, Stream stream)
      : p_(p), products_(products), stream_(stream), shape_(p), layout_(shape_) {}

  void run() {
    const TensorView y = attend();
    const NormWeights& norm = p_.norm2;
    const TensorView x = part(0, shape_.width);
    gate_residual_layer_norm_modulate(by_sample(y), p_.stream,
                                      p_.cross ? std::nullopt : OptionalView(mod(2)), norm.weight,
                                      norm.bias, mod(4), mod(3), std::nullopt, std::nullopt,
                                      norm.eps, by_sample(x), p_.stream, stream_);
    add_feed_forward(x);
  }

 private:
  // One of the six vectors per sample, [B, D].
  TensorView mod(int64_t index) const { return selected(p_.modulation, 1, index); }

  TensorView at(int64_t offset, int64_t rows, int64_t columns) const {
    return contiguous(static_cast<char*>(p_.workspace) + offset, p_.stream, {rows, columns});
  }

  TensorView part(int index, int64_t columns) const {
    return at(index * layout_.part, shape_.rows, columns);
  }

  TensorView by_sample(const TensorView& rows) const {  // [B * S, D] -> [B, S, D]
    return contiguous(rows.data, rows, {shape_.batch, shape_.length, rows.size[1]});
  }

  void linear(const TensorView& x, const LinearWeights& w, const TensorView& out,
              const Epilogue& epilogue = {}) const {
    products_.linear(x, w.weight, w.bias, epilogue, out, stream_);
  }

  // What the last attention adds to the stream.
  TensorView attend() const {
    const NormWeights& norm = p_.norm1;
    const bool sliced = shape_.by_heads();
    const TensorView normed = part(sliced ? 1 : 3, shape_.width);
    layer_norm_modulate(p_.stream, norm.weight, norm.bias, mod(1), mod(0), norm.eps,
                        by_sample(normed), stream_);
    const TensorView mixed = sliced ? mix_slices(normed) : mix_all(normed);
    const TensorView y = part(sliced ? 1 : 0, shape_.width);
    const LinearWeights& out = p_.attention.out;
    if (!p_.cross) {
      linear(mixed, out, y);
      return y;
    }
    Epilogue epilogue;
    epilogue.kind = LinearEpilogue::kGatedResidual;
    epilogue.gate = mod(2);
    epilogue.rows_per_sample = shape_.length;
    epilogue.scratch = y;
    linear(mixed, out, as_rows(p_.stream), epilogue);
    return attend_to_context();
  }

  // All heads at once, from part 3 to part 3.
  TensorView mix_all(const TensorView& normed) const {
    const AttentionWeights& w = p_.attention;
    const int64_t inner = shape_.inner;
    TensorView q = part(0, inner);
    TensorView k = part(1, inner);
    TensorView v = part(2, inner);
    if (w.k) {
      linear(normed, w.q, q);
      linear(normed, *w.k, k);
      linear(normed, *w.v, v);
    } else {
      const TensorView fused = at(0, shape_.rows, 3 * inner);
      linear(normed, w.q, fused);
      q = narrowed(fused, 1, 0, inner);
      k = narrowed(fused, 1, inner, inner);
      v = narrowed(fused, 1, 2 * inner, inner);
    }
    const TensorView mixed = part(3, inner);
    mix(w, q, by_head(k, shape_.batch, w.heads), by_head(v, shape_.batch, w.heads), mixed);
    return mixed;
  }

  // Some heads at a time, over the queries in part 0. The weights are read once all the same.
  TensorView mix_slices(const TensorView& normed) const {
    const AttentionWeights& w = p_.attention;
    const int64_t inner = shape_.inner;
    const int64_t dim = inner / w.heads;
    const TensorView q = part(0, inner);
    linear(normed, rows_of(w.q, 0, inner), q);
    for (int64_t head = 0; head < w.heads; head += shape_.head_step) {
      AttentionWeights some = w;
      some.heads = std::min(shape_.head_step, w.heads - head);
      const int64_t first = head * dim;
      const int64_t columns = some.heads * dim;
      const TensorView k = at(layout_.slice_keys, shape_.rows, columns);
      const TensorView v = at(layout_.slice_values, shape_.rows, columns);
      linear(normed, w.k ? rows_of(*w.k, first, columns) : rows_of(w.q, inner + first, columns), k);
      linear(normed, w.v ? rows_of(*w.v, first, columns) : rows_of(w.q, 2 * inner + first, columns),
             v);
      if (w.mask && w.mask->size[1] > 1) some.mask = narrowed(*w.mask, 1, head, some.heads);
      const TensorView own = narrowed(q, 1, first, columns);
      mix(some, own, by_head(k, shape_.batch, some.heads), by_head(v, shape_.batch, some.heads),
          own);
    }
    return q;
  }

  static LinearWeights rows_of(const LinearWeights& w, int64_t begin, int64_t count) {
    LinearWeights some{narrowed(w.weight, 0, begin, count), std::nullopt};
    if (w.bias) some.bias = narrowed(*w.bias, 0, begin, count);
    return some;
  }

  TensorView attend_to_context() const {
    const CrossAttention& cross = *p_.cross;
    const AttentionWeights& w = cross.weights;
    const int64_t inner = shape_.cross_inner;
    const TensorView q = part(0, inner);
    linear(as_rows(p_.stream), w.q, q);
    const TensorView mixed = part(1, inner);
    if (cross.keys) {
      mix(w, q, *cross.keys, *cross.values, mixed);
    } else {
      const TensorView& context = *cross.context;
      const int64_t rows = shape_.batch * shape_.keys;
      TensorView source = contiguous(context.data, context, {rows, context.size[2]});
      source.stride[0] = shape_.keys > 1 ? context.stride[1] : context.stride[0];
      const TensorView k = at(layout_.context_keys, rows, inner);
      const TensorView v = at(layout_.context_values, rows, inner);
      linear(source, *w.k, k);
      linear(source, *w.v, v);
      mix(w, q, by_head(k, shape_.batch, w.heads), by_head(v, shape_.batch, w.heads), mixed);
    }
    const TensorView y = part(0, shape_.width);
    linear(mixed, w.out, y);
    return y;
  }

  void mix(const AttentionWeights& w, const TensorView& q, const TensorView& k, const TensorView& v,
           const TensorView& out) const {
    products_.attention(by_head(q, shape_.batch, w.heads), k, v, w.mask, w.scale,
                        by_head(out, shape_.batch, w.heads), stream_);
  }

  // Adds gate * ff(x) to the stream, x: [B * S, D].
  void add_feed_forward(const TensorView& x) const {
    FeedForwardParams ff;
    ff.x = x;
    ff.layers = p_.feed_forward;
    ff.layers.rows = shape_.ff_rows;
    ff.gate = mod(5);
    ff.rows_per_sample = shape_.length;
    ff.add = true;
    ff.out = as_rows(p_.stream);
    ff.scratch = static_cast<char*>(p_.workspace) + layout_.hidden;
    ff.scratch_bytes = layout_.total - layout_.hidden;
    feed_forward(ff, products_, stream_);
  }

  const TransformerBlockParams& p_;
  Products& products_;
  Stream stream_;
  Shape shape_;
  Layout layout_;
};

}  // namespace

void check(const TransformerBlockParams& p) {
  const TensorView& x = p.stream;
  ACCELRT_CHECK(x.ndim == 3, kOp, ": stream has ", x.ndim, " dimensions, expected 3");
  const TensorView dense = contiguous(x.data, x, {x.size[0], x.size[1], x.size[2]});
  for (int d = 0; d < 3 && x.numel() > 0; ++d) {
    ACCELRT_CHECK(x.size[d] == 1 || x.stride[d] == dense.stride[d], kOp,
                  ": stream is not contiguous: stride ", x.stride[d], " in dimension ", d,
                  ", expected ", dense.stride[d]);
  }
  check_same_type(kOp, "modulation", p.modulation, x);
  ACCELRT_CHECK(p.modulation.ndim == 3 && p.modulation.size[0] == x.size[0] &&
                    p.modulation.size[1] == 6 && p.modulation.size[2] == x.size[2],
                kOp, ": modulation is not of shape [", x.size[0], ", 6, ", x.size[2], "]");
  check_unit_stride(kOp, "modulation", p.modulation);
  const AttentionWeights& a = p.attention;
  const FeedForward& ff = p.feed_forward;
  for (const TensorView* w : {&a.q.weight, &a.out.weight, &ff.in.weight, &ff.out.weight}) {
    ACCELRT_CHECK(w->ndim == 2, kOp, ": a weight has ", w->ndim, " dimensions, expected 2");
  }
  const Shape s(p);
  ACCELRT_CHECK(a.k.has_value() == a.v.has_value(), kOp, ": k without v, or v without k");
  check_linear("q", a.q, a.k ? s.inner : 3 * s.inner, s.width, x);
  if (a.k) {
    check_linear("k", *a.k, s.inner, s.width, x);
    check_linear("v", *a.v, s.inner, s.width, x);
  }
  check_linear("out", a.out, s.width, s.inner, x);
  check_heads("self-attention", s.inner, a.heads);
  ACCELRT_CHECK(p.heads_per_slice >= 0, kOp, ": heads per slice is ", p.heads_per_slice,
                ", expected 0 or more");
  check_mask("mask", a, s, s.length, x);
  if (p.cross) check_cross(*p.cross, s, x);
  const int kind = static_cast<int>(ff.activation);
  ACCELRT_CHECK(kind >= 0 && kind <= 3, kOp, ": unknown activation ", kind);
  const bool geglu = is_geglu(ff.activation);
  ACCELRT_CHECK(!geglu || s.hidden % 2 == 0, kOp, ": the feed-forward has ", s.hidden,
                " hidden columns, expected an even number");
  check_linear("ff in", ff.in, s.hidden, s.width, x);
  check_linear("ff out", ff.out, s.width, geglu ? s.hidden / 2 : s.hidden, x);
  ACCELRT_CHECK(ff.rows >= 0, kOp, ": ff rows is ", ff.rows, ", expected 0 or more");
}

int64_t workspace_bytes(const TransformerBlockParams& p) { return Layout(Shape(p)).total; }

void transformer_block(const TransformerBlockParams& p, Products& products, Stream stream) {
  check(p);
  if (p.stream.numel() == 0) return;
  const int64_t needed = workspace_bytes(p);
  ACCELRT_CHECK(p.workspace_bytes >= needed, kOp, ": the workspace has ", p.workspace_bytes,
                " bytes, expected at least ", needed);
  Forward(p, products, stream).run();
}

}  // namespace accelrt
