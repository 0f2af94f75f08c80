// SPDX-License-Identifier: MIT
// Rows that visit most come first, so that none that takes long begins when others end. Within a class of rows that visit
// about as much the order stays: neighbours share keys in the L2 cache. Where that does not hold all keys, only rows far above
// the mean are taken out of it: at 16,384 tokens and 24 heads uniform rows in 32 classes took up to 10 % longer.
#include "order.h"

#include <cooperative_groups.h>

#include "../common/warp.h"

namespace lite_attention::sm90 {
namespace {

// One cluster, whose thread blocks read each other's sums, so that nothing has to be zero before the launch.
constexpr int kGroup = 8;
constexpr int kThreads = 1024;
constexpr int kClasses = 32;
static_assert(kClasses == kWarp);  // a lane each
constexpr int kMeanLevel = 8;      // of a row that visits as much as the mean of all

// What MaskWalk::visits says of a row, found by one thread.
__device__ int visits_of(RowParams const& params, int row) {
    Work work;
    locate(params, row, work);
    int const blocks = reach(params, (work.tile + 1) * params.tile_queries);
    if (params.thresholds[work.batch] == -INFINITY) { return blocks; }
    int32_t const* const words = params.mask + work.batch * params.mask_batch_stride + work.head * params.mask_head_stride +
        work.tile * params.mask_tile_stride;
    int visits = 0;
    int allowed = 0;
    for (int word = 0; word * 32 < blocks; ++word) {
        int const rest = blocks - word * 32;
        uint32_t may = rest >= 32 ? ~0u : (1u << rest) - 1;
        if (params.must_skip != nullptr) { may &= ~static_cast<uint32_t>(params.must_skip[word]); }
        uint32_t visited = words[word];
        if (params.must_visit != nullptr) { visited |= params.must_visit[word]; }
        visits += __popc(visited & may);
        allowed += __popc(may);
    }
    return visits > 0 ? visits : allowed;
}

// The class of a row, 0 for those that come first.
__device__ int class_of(int visits, uint32_t mean, bool near) {
    uint32_t const level = min(visits * kMeanLevel / mean, kClasses - 1);
    if (near) { return kClasses - 1 - level; }
    return level == kClasses - 1 ? 0 : level >= 2 * kMeanLevel ? 1 : 2;
}

// The number of a lane among those of the warp with the same class, and how many those are.
struct Peers {
    __device__ explicit Peers(int row_class) {
        uint32_t const same = __match_any_sync(~0u, row_class);
        before = __popc(same & ((1u << threadIdx.x % kWarp) - 1));
        count = __popc(same);
        first = __ffs(same) - 1;
    }
    int before;
    int count;
    int first;
};

__global__ void __cluster_dims__(kGroup) __launch_bounds__(kThreads)
order_kernel(RowParams const params, int32_t* order, int64_t* visited, bool near) {
    cudaTriggerProgrammaticLaunchCompletion();  // what follows may take its place on the other multiprocessors
    auto const cluster = cooperative_groups::this_cluster();
    int const rank = blockIdx.x;
    int const lane = threadIdx.x % kWarp;
    int const rows = params.tiles * params.heads * params.batch;
    int const part = ceil_div(rows, kGroup);
    int const begin = min(rank * part, rows);
    int const end = min(begin + part, rows);
    int32_t* const visits = order + rows;
    __shared__ unsigned long long sum;    // of what the thread block's rows visit
    __shared__ int count[kClasses + 1];   // of its rows in each class; the last one is of threads without a row
    __shared__ int place[kClasses + 1];   // of the next one of its rows in each class
    if (threadIdx.x == 0) {
        sum = 0;
        if (rank == 0) { *params.counter = 0; }
    }
    if (threadIdx.x <= kClasses) { count[threadIdx.x] = place[threadIdx.x] = 0; }
    __syncthreads();

    uint32_t own = 0;
    for (int row = begin + threadIdx.x; row < end; row += kThreads) {
        visits[row] = visits_of(params, row);
        own += visits[row];
    }
    own = __reduce_add_sync(~0u, own);
    if (lane == 0) { atomicAdd(&sum, own); }
    cluster.sync();
    unsigned long long all = 0;
    for (int block = 0; block < kGroup; ++block) { all += *cluster.map_shared_rank(&sum, block); }
    uint32_t const mean = max(static_cast<uint32_t>(all / rows), 1u);
    if (rank == 0 && threadIdx.x == 0 && visited != nullptr) { *visited = all; }

    auto const for_rows = [&](int* next, auto action) {
        for (int first = begin; first < end; first += kThreads) {
            int const row = first + threadIdx.x;
            int const row_class = row < end ? class_of(visits[row], mean, near) : kClasses;
            Peers const peers(row_class);
            int base = 0;
            if (peers.before == 0) { base = atomicAdd(next + row_class, peers.count); }
            base = __shfl_sync(~0u, base, peers.first);
            action(row, base + peers.before);
        }
    };
    for_rows(count, [](int, int) {});
    cluster.sync();
    if (threadIdx.x < kClasses) {
        int mine = 0;    // rows of the class
        int before = 0;  // and those that are before this thread block's
        for (int block = 0; block < kGroup; ++block) {
            int const other = cluster.map_shared_rank(count, block)[lane];
            mine += other;
            if (block < rank) { before += other; }
        }
        int up_to = mine;
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            int const other = __shfl_up_sync(~0u, up_to, distance);
            if (lane >= distance) { up_to += other; }
        }
        place[lane] = up_to - mine + before;
    }
    cluster.sync();  // and nobody leaves whose counts are still read
    for_rows(place, [&](int row, int at) {
        if (row < end) { order[at] = row; }
    });
}

}  // namespace

cudaError_t order_rows(RowParams const& rows, int64_t* visited, bool near, cudaStream_t stream) {
    order_kernel<<<kGroup, kThreads, 0, stream>>>(rows, const_cast<int32_t*>(rows.order), visited, near);
    return cudaGetLastError();
}

}  // namespace lite_attention::sm90
