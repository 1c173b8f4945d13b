// The kernels. A block of kThreads takes a row or one of `parts` shares of it; its terms are made by one
// thread.
#pragma once

#include "epilogue.cuh"
#include "row_grad.cuh"

namespace mixce {

// Whether the forward writes the gradient too, and where it finds the logits again for it.
enum class Pass2 { kNone, kFromGlobal, kFromShared };

// How a kernel is launched: see mixce_kernels/backends/cuda_launch.py.
struct Launch {
  int parts;       // blocks of a row
  void* partials;  // [N, parts] Partials of a forward whose rows are split without a cluster, else null
};

// Blocks that must fit a multiprocessor. Left to itself the compiler sooner spills a few registers than gives
// up a block. Five leave 48 registers a thread, enough for one plain pass; three leave 80, for two passes, a
// softcap or moments; float64 gets 128.
template <typename T, bool kPlain>
constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 2
                           : kPlain                    ? 5
                                                       : 3;

// What a block keeps in shared memory before the vectors it holds.
template <typename Real>
struct alignas(16) SharedState {
  Partial<Real> warps[kWarps];
  Partial<Real> block;
  GradTerms<Real> terms;
};

// What pass 2 alone keeps there.
template <typename Real>
struct SharedTerms {
  GradTerms<Real> terms;
  Exponential<Real> exponential;
};

// The gradient of an ignored row.
template <typename T>
__device__ __forceinline__ void write_zeros(const RowParams& p, uint32_t row, int part, int parts) {
  T* const grad = grad_row<T>(p, row);
  const auto body = body_of<T>(grad, static_cast<int>(p.vocab_size));
  const Share share = share_of(body.count, part, parts);
  uint4* const vectors = reinterpret_cast<uint4*>(grad + body.begin);
  for (int i = share.first + threadIdx.x; i < share.last; i += kThreads) {
    ptx::store_streaming(vectors + i, make_uint4(0, 0, 0, 0));
  }
  if (share.edges && threadIdx.x < body.edges) grad[body.edge(threadIdx.x)] = T{};
}

// Pass 1, epilogue and, with kPass2, pass 2. Reads each logit once, from shared memory or L2 a second time;
// writes 6 numbers a row and the gradient. The blocks of a split row meet in distributed shared memory where
// they are a cluster (with kFromShared), or leave their partials to merge_kernel (with kNone).
template <typename T, bool kCap, bool kMoments, Pass2 kPass2>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, !kCap && !kMoments && kPass2 == Pass2::kNone>))
    forward_kernel(const RowParams row_params, const ForwardParams forward_params, const Launch launch) {
  using Real = typename Format<T>::Real;
  const RowParams p = ptx::read_at_entry(row_params);
  const ForwardParams f = ptx::read_at_entry(forward_params);
  const uint32_t row = blockIdx.x / launch.parts;
  const int part = blockIdx.x % launch.parts;
  const Target target = target_of(p, row);
  if (target.ignored) {
    if (part == 0 && threadIdx.x == 0) store_ignored_row<Real>(p, f, row);
    if constexpr (kPass2 != Pass2::kNone) write_zeros<T>(p, row, part, launch.parts);
    return;
  }

  const int vocab_size = static_cast<int>(p.vocab_size);
  const T* const logits = logits_row<T>(p, row);
  // Read before any block may write over it.
  const Real x_target =
      loaded_once([&] { return target.known ? Format<T>::to_real(logits[target.column]) : Real{0}; });
  auto& shared = *reinterpret_cast<SharedState<Real>*>(ptx::shared_memory());
  uint4* const held = reinterpret_cast<uint4*>(&shared + 1);

  // Pass 1.
  const auto body = body_of<T>(logits, vocab_size);
  const Share share = share_of(body.count, part, launch.parts);
  // Without statistics no logit need be compared with the target's, and none reaches NaN.
  const double scale = kPass2 == Pass2::kNone
                           ? scale_of_row<kCap, Real>(p, row, [](auto load) { return loaded_once(load); })
                           : scale_of_differences(p.options);
  Accumulator<T, kCap, kMoments> accumulator(p, scale, f.stats == nullptr ? NAN : x_target, target.column);
  auto add = [&](const auto& vectors, int i) {
    accumulator.add(vectors, body.begin + i * Format<T>::kWidth);
  };
  if (share.edges && threadIdx.x < body.edges) {
    const int column = body.edge(threadIdx.x);
    accumulator.add(logits[column], column);
  }
  if constexpr (kPass2 == Pass2::kFromShared) {
    walk_and_hold<kUnroll<T>>(body.vectors, share, held, add);
  } else {
    walk_global<kUnroll<T>>(body.vectors, share, add);
  }
  merge_warp<kMoments>(accumulator.part, accumulator.exponential);
  if (threadIdx.x % kWarpSize == 0) {
    leave_partial<kMoments>(shared.warps[threadIdx.x / kWarpSize], accumulator.part);
  }
  __syncthreads();

  // Epilogue.
  const bool cluster = kPass2 == Pass2::kFromShared && launch.parts > 1;
  if (threadIdx.x < kWarpSize) {
    accumulator.part = merge_parts<kMoments>(
        kWarps, [&](int i) -> const auto& { return shared.warps[i]; }, accumulator.exponential);
    if (threadIdx.x == 0) leave_partial<kMoments>(shared.block, accumulator.part);
  }
  if (cluster) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (threadIdx.x < kWarpSize) {
      accumulator.part = merge_parts<kMoments>(
          launch.parts, [&](int i) -> const auto& { return *ptx::in_cluster(&shared.block, i); },
          accumulator.exponential);
    }
    ptx::cluster_arrive();  // no more need of the other blocks' shared memory
  } else if (kPass2 == Pass2::kNone && launch.parts > 1) {
    if (threadIdx.x == 0) {
      leave_partial<kMoments>(static_cast<Partial<Real>*>(launch.partials)[blockIdx.x], accumulator.part);
    }
    return;
  }
  if (threadIdx.x == 0) {
    Real state[kStateWidth];
    finish_row<kCap, kMoments>(p, f, mixture_at<Real>(p, forward_params, row), row, scale, accumulator.part,
                               x_target, target.known, part == 0, state);
    if constexpr (kPass2 != Pass2::kNone)
      shared.terms = pass_2_terms<kCap, false>(p, row, scale, state, x_target);
  }
  if constexpr (kPass2 == Pass2::kNone) return;

  // Pass 2.
  __syncthreads();
  const GradTerms<Real> terms = shared.terms;
  const Gradient<T, kCap, false> gradient(p, accumulator.exponential, terms);
  T* const grad = grad_row<T>(p, row);
  if constexpr (kPass2 == Pass2::kFromShared) {
    write_row_from_shared(grad, logits, held, body, share, gradient, target.column,
                          Format<T>::from_real(terms.t));
  } else {
    write_row(grad, logits, vocab_size, part, launch.parts, gradient, target.column,
              Format<T>::from_real(terms.t));
  }
  if (cluster) ptx::cluster_wait();
}

// The epilogue of rows that several blocks shared: a warp a row.
template <typename T, bool kCap, bool kMoments>
__global__ void __launch_bounds__(kWarpSize)
    merge_kernel(const RowParams row_params, const ForwardParams forward_params, const Launch launch) {
  using Real = typename Format<T>::Real;
  const RowParams p = ptx::read_at_entry(row_params);
  const ForwardParams f = ptx::read_at_entry(forward_params);
  const uint32_t row = blockIdx.x;
  const Target target = target_of(p, row);
  if (target.ignored) return;
  const Partial<Real>* const partials =
      static_cast<const Partial<Real>*>(launch.partials) + static_cast<int64_t>(row) * launch.parts;
  const double scale = scale_of_row<kCap, Real>(p, row, [](auto load) { return loaded_once(load); });
  const auto whole = merge_parts<kMoments>(
      launch.parts, [&](int i) -> const auto& { return partials[i]; }, Exponential<Real>(scale));
  if (threadIdx.x > 0) return;
  const T* const logits = logits_row<T>(p, row);
  const Real x_target = target.known ? Format<T>::to_real(logits[target.column]) : Real{0};
  Real state[kStateWidth];
  finish_row<kCap, kMoments>(p, f, mixture_at<Real>(p, forward_params, row), row, scale, whole, x_target,
                             target.known, true, state);
}

// Pass 2 alone, from the state of the forward: reads and writes each logit once. Rows are taken in the
// reverse of the forward's order: its last ones may still be in L2.
template <typename T, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, !kCap && !kEntropy>))
    logits_grad_kernel(const RowParams row_params, const Launch launch) {
  using Real = typename Format<T>::Real;
  const RowParams p = ptx::read_at_entry(row_params);
  const uint32_t row = static_cast<uint32_t>(p.logits_rows.number) - 1 - blockIdx.x / launch.parts;
  const int part = blockIdx.x % launch.parts;
  const Target target = target_of(p, row);
  if (target.ignored) return write_zeros<T>(p, row, part, launch.parts);

  const T* const logits = logits_row<T>(p, row);
  T* const grad = grad_row<T>(p, row);
  auto& shared = *reinterpret_cast<SharedTerms<Real>*>(ptx::shared_memory());
  if (threadIdx.x == 0) {
    const double scale = scale_of_row<kCap, Real>(p, row, [](auto load) { return load(); });
    Real state[kStateWidth];
    load_state(p, row, state);
    // Only with a cap, and read before this block may write over it; what another block has written over is
    // of no use to this one.
    const Real x_target = kCap && target.known ? Format<T>::to_real(logits[target.column]) : Real{0};
    shared.terms = pass_2_terms<kCap, kEntropy>(p, row, scale, state, x_target);
    shared.exponential = Exponential<Real>(scale);
  }
  __syncthreads();
  const GradTerms<Real> terms = shared.terms;
  const Gradient<T, kCap, kEntropy> gradient(p, shared.exponential, terms);
  write_row(grad, logits, static_cast<int>(p.vocab_size), part, launch.parts, gradient, target.column,
            Format<T>::from_real(terms.t));
}

// Multiplies a row of the gradient by its factor in place; a factor of 1 leaves the row alone.
template <typename T>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, true>))
    scale_rows_kernel(const RowParams row_params, const Launch launch) {
  using F = Format<T>;
  using Real = typename F::Real;
  const RowParams p = ptx::read_at_entry(row_params);
  const uint32_t row = blockIdx.x / launch.parts;
  const Real factor = loaded_once([&] { return row_factor_at<Real>(p, row); });
  if (factor == 1) return;
  T* const grad = grad_row<T>(p, row);
  auto scaled = [&](auto value) {
    if constexpr (sizeof(value) == sizeof(uint4)) {
      Real x[F::kWidth];
      F::unpack(value, x);
#pragma unroll
      for (int k = 0; k < F::kWidth; ++k) x[k] *= factor;
      return F::pack(x);
    } else {
      return F::from_real(F::to_real(value) * factor);
    }
  };
  write_row<T>(grad, grad, static_cast<int>(p.vocab_size), blockIdx.x % launch.parts, launch.parts, scaled,
               -1, T{});
}

}  // namespace mixce
