#include "core/parallel.h"

#include <sys/mman.h>

namespace kantor {

void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  // Advice only: a kernel without huge pages refuses, and everything still works.
  if (end > begin + page) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace kantor
