// SPDX-License-Identifier: MIT
// The order in which the rows of the mask are worked on.
#pragma once

#include "schedule.h"

namespace lite_attention::sm90 {

// Writes `rows.order` and, behind it, a word for each row that only this needs; a zero to `rows.counter`; and to `visited`, unless
// null, how many blocks all rows visit together. `near`: the L2 cache holds all keys and values.
cudaError_t order_rows(RowParams const& rows, int64_t* visited, bool near, cudaStream_t stream);

}  // namespace lite_attention::sm90
