// SPDX-License-Identifier: Apache-2.0
// The table of clouds of a ragged batch.

#ifndef GPU3D_CLOUDS_CUH
#define GPU3D_CLOUDS_CUH

#include "types.cuh"

#define INLINE_CLOUDS 64  // mirrored by gpu3d/cuda/clouds.py

// Row b of the table says where cloud b begins; row `count` says where the batch ends.
struct Cloud {
    int point;  // first point
    int tile;   // first tile; each kernel's file says what a tile is
    int group;  // first group, likewise
    int slot;   // first slot, a multiple of bucket_size
};

// The table of a small batch lies in the kernel's arguments: no copy to the device, no memory to keep alive, and a CUDA
// graph can hold it.
struct Clouds {
    const Cloud *table;  // [count + 1] on the device, or null
    int count;
    int bucket_size;
    Cloud inlined[INLINE_CLOUDS + 1];
};

__device__ __forceinline__ const Cloud *rows_of(const Clouds &clouds) {
    return clouds.table ? clouds.table : clouds.inlined;
}

// How many points, slots, tiles and groups the batch has. Grids are upper bounds: blocks beyond these return.
__device__ __forceinline__ int points_of(const Clouds &clouds) { return rows_of(clouds)[clouds.count].point; }
__device__ __forceinline__ int slots_of(const Clouds &clouds) { return rows_of(clouds)[clouds.count].slot; }
__device__ __forceinline__ int tiles_of(const Clouds &clouds) { return rows_of(clouds)[clouds.count].tile; }
__device__ __forceinline__ int groups_of(const Clouds &clouds) { return rows_of(clouds)[clouds.count].group; }

// The cloud whose range of tiles, groups, slots or points holds `item`. Empty clouds hold nothing.
template <int Cloud::*COLUMN>
__device__ __forceinline__ int cloud_of(const Clouds &clouds, int item) {
    const Cloud *rows = rows_of(clouds);
    int low = 0, high = clouds.count;  // rows[low].column <= item < rows[high].column
    while (high - low > 1) {
        const int middle = (low + high) >> 1;
        if (rows[middle].*COLUMN <= item) low = middle;
        else high = middle;
    }
    return low;
}

#endif  // GPU3D_CLOUDS_CUH
