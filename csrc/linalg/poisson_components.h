// Connected components of a voxel grid's fluid that touch no air: on each of them constants are the null space.
#pragma once
#include <cstdint>

#include "linalg/operator.h"

namespace kantor {

// labels[i] = 0, 1, ... for the cells of closed components, numbered in the order of their first cells, -1 for all
// other cells. Returns how many there are. `labels` holds one element a cell. O(n) on one thread, no other memory than
// the runs' parents.
int64_t closed_components_cpu(int64_t nz, int64_t ny, int64_t nx, const uint16_t* cells, int32_t* labels);

}  // namespace kantor
