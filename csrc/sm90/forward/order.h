// SPDX-License-Identifier: MIT
// The order in which the rows of the mask are worked on.
#pragma once

#include "schedule.h"

namespace lite_attention::sm90 {

// Words that are zero before the launch: the number of rows that are taken, and of thread blocks that have weighed theirs.
constexpr int kCounters = 2;

// Writes `rows.order` and, behind it, a word for each row that only this needs.
cudaError_t order_rows(RowParams const& rows, int32_t* counters, cudaStream_t stream);

}  // namespace lite_attention::sm90
