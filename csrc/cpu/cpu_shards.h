// A split vocabulary on the CPU: loops over the tokens, for which one thread is enough.
#pragma once

#include "../shards.h"

namespace mixce {

void cpu_localize_targets(const RowParams& params, const LocalTargets& to);
void cpu_write_message(const RowParams& params, const ForwardParams& forward, const ShardMessage& to);
// Returns the first row whose target not just one rank holds, having written nothing, or -1.
int64_t cpu_merge_messages(const RowParams& params, const ForwardParams& forward, const Messages& messages);

}  // namespace mixce
