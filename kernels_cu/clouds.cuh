// SPDX-License-Identifier: Apache-2.0
// The batch's table of clouds, which every kernel over ragged batches reads.

#ifndef GPU3D_CLOUDS_CUH
#define GPU3D_CLOUDS_CUH

typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE_CLOUDS 64    // mirrored by gpu3d/_clouds.py
#define FULL 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)

// Row b says where cloud b begins, row `count` where the batch ends.
struct Cloud {
    int point;              // first point
    int tile;               // first tile: what a tile is, the kernel's file says
    int group;              // first group: likewise
    int slot;               // first slot, a multiple of bucket_size
};

// Small batches travel inside the kernel's arguments: no copy to the device, nothing to keep alive, capturable.
struct Clouds {
    const Cloud *table;     // [count + 1] on the device, or null
    int count;
    int bucket_size;
    Cloud inlined[INLINE_CLOUDS + 1];
};

__device__ __forceinline__ const Cloud *rows_of(const Clouds &clouds) {
    return clouds.table ? clouds.table : clouds.inlined;
}

// The cloud whose range of tiles, groups or points holds `item`. Empty clouds hold nothing.
template <int Cloud::*COLUMN>
__device__ __forceinline__ int cloud_of(const Clouds &clouds, int item) {
    const Cloud *rows = rows_of(clouds);
    int low = 0, high = clouds.count;           // rows[low].column <= item < rows[high].column
    while (high - low > 1) {
        const int middle = (low + high) >> 1;
        if (rows[middle].*COLUMN <= item) low = middle; else high = middle;
    }
    return low;
}

// x, which is the same on all lanes. The compiler knows it then, and that a branch on it does not part the warp: where it cannot
// know, it asks before each vote and shuffle whether the warp is together. A __syncwarp() behind a branch in a loop helps likewise.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(FULL, x); }

#endif  // GPU3D_CLOUDS_CUH
