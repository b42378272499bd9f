// One kernel for many tensors: a table with a row for each parameter, cut into chunks that workers or blocks of threads
// take in turn. On CUDA the table lies in device memory, so that the number of launches does not depend on the number
// of tensors. Torch owns all of it; the pointers are good for one step.
#pragma once
#include <cstdint>

#include "core/hd.h"
#include "core/parallel.h"

namespace kantor {

struct TableRow {
  void* data[4];        // the same row of up to four lists of tensors; what they are, the kernel says
  int64_t size;         // elements
  int64_t block;        // consecutive elements that share an entry of the last list
  int64_t length;       // elements in a chunk
  int64_t first_chunk;  // counted through all rows
  double number[8];

  template <class T>
  KANTOR_HD T* list(int index) const {
    return static_cast<T*>(data[index]);
  }
};
static_assert(sizeof(TableRow) == 128, "kantor._C.pyi says 16 words");
inline constexpr int64_t table_row_words = sizeof(TableRow) / 8;

struct TensorTable {
  const TableRow* rows;
  int64_t count, chunks;

  // The last row that begins at or before the chunk; empty ones begin where the next does.
  KANTOR_HD const TableRow& row_of(int64_t chunk) const {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (rows[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return rows[low];
  }
};

// Elements [begin, begin + size) of a row.
struct Chunk {
  int64_t begin, size;
};
KANTOR_HD Chunk chunk_of(const TableRow& row, int64_t chunk) {
  const int64_t begin = (chunk - row.first_chunk) * row.length, left = row.size - begin;
  return {begin, left < row.length ? left : row.length};
}

// body(row, chunk) for all chunks. A chunk's result depends on nothing but its row: the same bits for any number of
// threads.
template <class Body>
void for_each_chunk(int threads, const TensorTable& table, Body&& body) {
  parallel_for(threads_for(threads, table.chunks * chunk_size), table.chunks, [&](int64_t chunk) {
    const TableRow& row = table.row_of(chunk);
    body(row, chunk_of(row, chunk));
  });
}

}  // namespace kantor
