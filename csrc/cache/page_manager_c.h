/* The page manager for C and for languages that call C. page_manager.h documents the calls.
 *
 * Every function returns a vxl_status. Any other status than VXL_OK means that nothing has
 * changed, neither the manager nor what the caller's pointers point to. vxl_pages_last_error()
 * then gives the reason, until the next failed call of the thread. Many threads may use a handle
 * at once, but no call may overlap its destruction. */
#ifndef VXL_PAGE_MANAGER_C_H
#define VXL_PAGE_MANAGER_C_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vxl_pages vxl_pages;

typedef enum vxl_status {
  VXL_OK = 0,
  VXL_BAD_ARGUMENT = 1, /* or a null pointer */
  VXL_UNKNOWN_SEQUENCE = 2,
  VXL_POOL_EXHAUSTED = 3,
  VXL_OUT_OF_MEMORY = 4,
  VXL_INTERNAL_ERROR = 5
} vxl_status;

typedef struct vxl_page_copy { /* the first `rows` rows of page `source` go to `target` */
  int32_t source, target, rows;
} vxl_page_copy;

typedef struct vxl_page_stats {
  int64_t free_pages, used_pages, shared_pages, peak_used_pages;
  int64_t sequences, tokens, page_copies;
} vxl_page_stats;

vxl_status vxl_pages_create(int64_t num_pages, int64_t page_size, vxl_pages** pages);
void vxl_pages_destroy(vxl_pages* pages); /* NULL is allowed */

vxl_status vxl_pages_new_sequence(vxl_pages* pages, int64_t* seq);
vxl_status vxl_pages_fork(vxl_pages* pages, int64_t seq, int64_t* child);
vxl_status vxl_pages_truncate(vxl_pages* pages, int64_t seq, int64_t length);
vxl_status vxl_pages_free(vxl_pages* pages, int64_t seq);

/* `copies` has room for n. The caller performs the first `num_copies` of them before it writes. */
vxl_status vxl_pages_reserve(vxl_pages* pages, const int64_t* seqs, int64_t n, int64_t rows,
                             vxl_page_copy* copies, int64_t* num_copies);
vxl_status vxl_pages_commit(vxl_pages* pages, const int64_t* seqs, int64_t n, int64_t rows);

vxl_status vxl_pages_length(const vxl_pages* pages, int64_t seq, int64_t* length);
vxl_status vxl_pages_reserved(const vxl_pages* pages, int64_t seq, int64_t* rows);
vxl_status vxl_pages_capacity(const vxl_pages* pages, int64_t seq, int64_t* rows);
/* out[i * stride + j] = page j of seqs[i], or `pad` after its last page. */
vxl_status vxl_pages_fill_block_tables(const vxl_pages* pages, const int64_t* seqs, int64_t n,
                                       int32_t* out, int64_t stride, int32_t pad);
vxl_status vxl_pages_fill_lengths(const vxl_pages* pages, const int64_t* seqs, int64_t n,
                                  int32_t* out);

vxl_status vxl_pages_ref_count(const vxl_pages* pages, int64_t page, int64_t* holders);
vxl_status vxl_pages_stats(const vxl_pages* pages, vxl_page_stats* stats);

const char* vxl_pages_last_error(void); /* of this thread; "" if no call has failed */

#ifdef __cplusplus
}
#endif

#endif /* VXL_PAGE_MANAGER_C_H */
