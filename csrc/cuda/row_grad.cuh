// Pass 2 over a row, or over a part of it: the gradient from the row's terms and its logits.
#pragma once

#include "row_stats.cuh"

namespace mixce {

// The gradient of logits none of which is the target.
template <typename T, bool kCap>
struct Gradient {
  using F = Format<T>;
  using Real = typename F::Real;

  const Exponential<Real> exponential;
  const Softcap<Real> softcap;
  const GradTerms<Real> terms;

  __device__ __forceinline__ Gradient(const RowParams& params, const GradTerms<Real>& terms)
      : exponential(scale_of_differences(params)), softcap(params), terms(terms) {}

  __device__ __forceinline__ uint4 operator()(uint4 logits) const {
    Real x[F::kWidth];
    F::unpack(logits, x);
#pragma unroll
    for (int k = 0; k < F::kWidth; ++k) x[k] = of(x[k]);
    return F::pack(x);
  }
  __device__ __forceinline__ T operator()(T logit) const { return F::from_real(of(F::to_real(logit))); }

 private:
  __device__ __forceinline__ Real of(Real x) const {
    if constexpr (kCap) {
      const auto z = capped(x, softcap);
      return z.slope * (exponential(z.value - terms.m) * terms.k - terms.c);
    } else {
      return exponential(x - terms.m) * terms.k - terms.c;
    }
  }
};

// A row's logits seen through the vectors of its gradient, which may lie otherwise to a 16-byte boundary.
// Where they do, a vector is cut out of two aligned ones of the logits.
template <typename T>
struct Window {
  Body<T> body;          // of the gradient; narrower where a vector would reach out of the row of logits
  const uint4* logits;   // the aligned vector that holds the first number of the body's first vector
  int shift;             // bytes from its begin to that number

  __device__ __forceinline__ uint4 load(int i) const {
    if (shift == 0) return ptx::load_streaming(logits + i);
    const uint4 a = ptx::load_streaming(logits + i), b = ptx::load_streaming(logits + i + 1);
    uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int step = 2; step > 0; --step) {
#pragma unroll
      for (int k = 0; k + step < 8; ++k) w[k] = shift / 4 & step ? w[k + step] : w[k];
    }
    const int bits = shift % 4 * 8;
    return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
  }
};

template <typename T>
__device__ __forceinline__ Window<T> window_of(const T* logits, const T* grad, int vocab_size) {
  constexpr int kWidth = Format<T>::kWidth;
  Window<T> window{body_of(grad, vocab_size), nullptr, 0};
  Body<T>& body = window.body;
  window.shift = static_cast<int>(reinterpret_cast<uintptr_t>(logits + body.begin) % sizeof(uint4));
  const int before = window.shift / static_cast<int>(sizeof(T));
  if (before > 0 && body.count > 0) {
    if (body.begin < before) body.begin += kWidth, body.vectors += 1, body.count -= 1;
    if (body.count > 0 && body.end - before + kWidth > vocab_size) body.end -= kWidth, body.count -= 1;
    if (body.count == 0) body.end = body.begin;
    body.edges = body.begin + vocab_size - body.end;
  }
  window.logits = reinterpret_cast<const uint4*>(logits + body.begin - before);
  return window;
}

// Writes the vectors of a share, each gradient(load(i)), then its edges, and at last the target's gradient by
// the thread that wrote in its place before, which needs no barrier.
template <typename T, typename Load, typename Gradient>
__device__ __forceinline__ void write_row(T* grad, const T* logits, const Body<T>& body, const Share& share,
                                          Load load, const Gradient& gradient, int target, T at_target) {
  constexpr int kWidth = Format<T>::kWidth;
  const int thread = threadIdx.x;
  uint4* const vectors = reinterpret_cast<uint4*>(grad + body.begin);
  int i = share.first + thread;
  for (; i + (kUnroll - 1) * kThreads < share.last; i += kUnroll * kThreads) {
    uint4 group[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) group[j] = load(i + j * kThreads);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) ptx::store_streaming(vectors + i + j * kThreads, gradient(group[j]));
  }
  for (; i < share.last; i += kThreads) ptx::store_streaming(vectors + i, gradient(load(i)));
  if (share.edges && thread < body.edges) {
    const int column = body.edge(thread);
    grad[column] = gradient(logits[column]);
  }
  if (target < 0) return;
  const bool in_body = target >= body.begin && target < body.end;
  const int vector = (target - body.begin) / kWidth;
  const bool mine = in_body ? vector >= share.first && vector < share.last &&
                                  (vector - share.first) % kThreads == thread
                            : share.edges && body.edge(thread) == target && thread < body.edges;
  if (mine) grad[target] = at_target;
}

}  // namespace mixce
