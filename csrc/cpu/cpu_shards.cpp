#include "cpu_shards.h"

namespace mixce {
namespace {

template <typename Real>
void write_message(const RowParams& params, const ForwardParams& forward, const ShardMessage& to) {
  write_header<Real>(to);
  for (int64_t row = 0; row < params.logits_rows.number; ++row) write_numbers<Real>(params, forward, to, row);
}

template <typename Real>
int64_t merge_messages(const RowParams& params, const ForwardParams& forward, const Messages& messages) {
  const int64_t rows = params.logits_rows.number;
  for (int64_t row = 0; row < rows; ++row) {
    const bool ignored = target_at(params, row) == params.options.ignore_index;
    if (!ignored && holders_of<Real>(messages, rows, row) != 1) return row;
  }
  for (int64_t row = 0; row < rows; ++row) merge_row<Real>(params, forward, messages, row);
  return -1;
}

}  // namespace

void cpu_localize_targets(const RowParams& params, const LocalTargets& to) {
  for (int64_t row = 0; row < params.logits_rows.number; ++row) localize_target(params, to, row);
}

void cpu_write_message(const RowParams& params, const ForwardParams& forward, const ShardMessage& to) {
  params.dtype == DType::kFloat64 ? write_message<double>(params, forward, to)
                                  : write_message<float>(params, forward, to);
}

int64_t cpu_merge_messages(const RowParams& params, const ForwardParams& forward, const Messages& messages) {
  return params.dtype == DType::kFloat64 ? merge_messages<double>(params, forward, messages)
                                         : merge_messages<float>(params, forward, messages);
}

}  // namespace mixce
