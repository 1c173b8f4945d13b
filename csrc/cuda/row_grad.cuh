// Pass 2 over a row, or over a part of it: the gradient from the row's terms and its logits.
#pragma once

#include "row_stats.cuh"

namespace mixce {

// The gradient of logits none of which is the target; kEntropy: with that of the entropy.
template <typename T, bool kCap, bool kEntropy>
struct Gradient {
  using F = Format<T>;
  using Real = typename F::Real;

  const Exponential<Real> exponential;
  const Softcap<Real> softcap;
  const GradTerms<Real> terms;

  __device__ __forceinline__ Gradient(const RowParams& params, const Exponential<Real>& exponential,
                                      const GradTerms<Real>& terms)
      : exponential(exponential), softcap(softcap_of<Real>(params.options)), terms(terms) {}

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
      return z.slope * by_exponent(z.value - terms.m);
    } else {
      return by_exponent(x - terms.m);
    }
  }
  __device__ __forceinline__ Real by_exponent(Real d) const {
    // The clamp keeps 0 * -inf out; the exponential still brings a NaN.
    const Real k = kEntropy ? fma(terms.b, fmax(d, kLowestDifference<Real>), terms.k) : terms.k;
    return fma(exponential(d), k, -terms.c);
  }
};

// A row's logits seen through the vectors of its gradient, which may lie otherwise to a 16-byte boundary.
// Where they do, a vector is cut out of two aligned ones of the logits.
template <typename T>
struct Window {
  Body<T> body;         // of the gradient; narrower where a vector would reach out of the row of logits
  const uint4* logits;  // the aligned vector that holds the first number of the body's first vector
  int shift;            // bytes from its begin to that number

  // The vector kOffset bytes behind the one at `from`, one of the body's.
  template <int kOffset>
  __device__ __forceinline__ uint4 load_shifted(const uint4* from) const {
    const uint4 a = ptx::load_streaming<kOffset>(from), b = ptx::load_streaming<kOffset + 16>(from);
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

// Pass 2 over the vectors of a share: load(from, offset) yields one of `from` on, offset bytes behind it.
template <int kGroup, typename Load, typename Gradient>
__device__ __forceinline__ void write_vectors(uint4* to, const uint4* from, const Share& share, Load load,
                                              const Gradient& gradient) {
  Walk walk = walk_of<kGroup>(share);
  to += walk.first, from += walk.first;
  for (; walk.groups > 0; --walk.groups) {
    uint4 group[kGroup];
    unroll<kGroup>(
        [&](auto j) { group[j.value] = load(from, std::integral_constant<int, j.value * kVectorStep>()); });
    unroll<kGroup>(
        [&](auto j) { ptx::store_streaming<j.value * kVectorStep>(to, gradient(group[j.value])); });
    to += kGroup * kThreads, from += kGroup * kThreads;
  }
  for (; walk.rest > 0; --walk.rest) {
    ptx::store_streaming(to, gradient(load(from, std::integral_constant<int, 0>())));
    to += kThreads, from += kThreads;
  }
}

// The edges, and at last the target's gradient by the thread that wrote in its place before, which needs no
// barrier. A target of -1 is none.
template <typename T, typename Gradient>
__device__ __forceinline__ void write_edges_and_target(T* grad, const T* logits, const Body<T>& body,
                                                       const Share& share, const Gradient& gradient,
                                                       int target, T at_target) {
  const unsigned thread = threadIdx.x;
  int edge = -1;
  if (share.edges && static_cast<int>(thread) < body.edges) {
    edge = body.edge(thread);
    grad[edge] = gradient(logits[edge]);
  }
  if (target < 0) return;
  // Differences wrap where the target comes first.
  const unsigned in_body = target - body.begin;
  const unsigned in_share = in_body / Format<T>::kWidth - share.first;
  const bool mine =
      in_body < static_cast<unsigned>(body.end - body.begin)
          ? in_share < static_cast<unsigned>(share.last - share.first) && in_share % kThreads == thread
          : edge == target;
  if (mine) grad[target] = at_target;
}

// Pass 2 over one of `parts` shares of a row, from global memory.
template <typename T, typename Gradient>
__device__ __forceinline__ void write_row(T* grad, const T* logits, int vocab_size, int part, int parts,
                                          const Gradient& gradient, int target, T at_target) {
  const Window<T> window = window_of<T>(logits, grad, vocab_size);
  const Share share = share_of(window.body.count, part, parts);
  uint4* const to = reinterpret_cast<uint4*>(grad + window.body.begin);
  if (window.shift == 0) {
    write_vectors<kUnroll<T>>(
        to, window.logits, share,
        [](const uint4* from, auto offset) { return ptx::load_streaming<offset.value>(from); }, gradient);
  } else {
    write_vectors<kUnroll<T>>(
        to, window.logits, share,
        [&](const uint4* from, auto offset) { return window.template load_shifted<offset.value>(from); },
        gradient);
  }
  write_edges_and_target(grad, logits, window.body, share, gradient, target, at_target);
}

// The same from shared memory, where pass 1 left the share.
template <typename T, typename Gradient>
__device__ __forceinline__ void write_row_from_shared(T* grad, const T* logits, const uint4* held,
                                                      const Body<T>& body, const Share& share,
                                                      const Gradient& gradient, int target, T at_target) {
  write_vectors<kUnroll<T>>(
      reinterpret_cast<uint4*>(grad + body.begin), held - share.first, share,
      [](const uint4* from, auto offset) { return from[offset.value / sizeof(uint4)]; }, gradient);
  write_edges_and_target(grad, logits, body, share, gradient, target, at_target);
}

}  // namespace mixce
