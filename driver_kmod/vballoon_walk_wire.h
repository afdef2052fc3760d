/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Wire formats of the balloon device and of its walk queue.
 *
 * Generated from spec/vballoon_spec by `python -m vballoon_spec.walk.header --write`;
 * change the declarations there, not this file.
 */
#ifndef VBALLOON_WALK_WIRE_H
#define VBALLOON_WALK_WIRE_H

#include <linux/build_bug.h>
#include <linux/compiler.h>
#include <linux/types.h>

/* Feature bits, by number */
#define VBALLOON_F_MUST_TELL_HOST 0
#define VBALLOON_F_STATS_VQ 1
#define VBALLOON_F_DEFLATE_ON_OOM 2
#define VBALLOON_F_FREE_PAGE_HINT 3
#define VBALLOON_F_PAGE_POISON 4
#define VBALLOON_F_PAGE_REPORTING 5
#define VBALLOON_F_FREE_PAGE_WALK 63

/* Command ids of hinting and of the walk */
#define VBALLOON_CMD_ID_STOP 0
#define VBALLOON_CMD_ID_DONE 1
#define VBALLOON_CMD_ID_FIRST 2
#define VBALLOON_PFN_SHIFT 12

/* Tags of memory statistics */
#define VBALLOON_S_SWAP_IN 0
#define VBALLOON_S_SWAP_OUT 1
#define VBALLOON_S_MAJFLT 2
#define VBALLOON_S_MINFLT 3
#define VBALLOON_S_MEMFREE 4
#define VBALLOON_S_MEMTOT 5
#define VBALLOON_S_AVAIL 6
#define VBALLOON_S_CACHES 7
#define VBALLOON_S_HTLB_PGALLOC 8
#define VBALLOON_S_HTLB_PGFAIL 9
#define VBALLOON_S_OOM_KILL 10
#define VBALLOON_S_ALLOC_STALL 11
#define VBALLOON_S_ASYNC_SCAN 12
#define VBALLOON_S_DIRECT_SCAN 13
#define VBALLOON_S_ASYNC_RECLAIM 14
#define VBALLOON_S_DIRECT_RECLAIM 15
#define VBALLOON_S_NR 16

/* The walk queue: fixed number, largest buffer, types of buffers, flags (by number) */
#define VBALLOON_WALK_VQ 5
#define VBALLOON_WALK_BUFFER_MAX 65536
#define VBALLOON_WALK_BEGIN 1
#define VBALLOON_WALK_RANGES 2
#define VBALLOON_WALK_END 3
#define VBALLOON_WALK_MEMMAP 4
#define VBALLOON_WALK_END_F_CUT 0
#define VBALLOON_WALK_MEMMAP_F_PARTIAL 0

/* struct virtio_balloon_config with the walk extension (24 bytes, 16 without it) */
struct vballoon_config {
	__le32 num_pages;
	__le32 actual;
	__le32 free_page_hint_cmd_id;
	__le32 poison_val;
	__le32 free_page_walk_cmd_id;
	__le32 free_page_walk_min_order;
} __packed;
static_assert(sizeof(struct vballoon_config) == 24);

/* struct virtio_balloon_stat: one 10-byte entry (*Memory Statistics*) */
struct vballoon_stat {
	__le16 tag;
	__le64 val;
} __packed;
static_assert(sizeof(struct vballoon_stat) == 10);

/* The first 16 bytes of every buffer */
struct vballoon_walk_header {
	__le16 type;
	__le16 flags;
	__le32 round;
	__le32 seq;
	__le32 num;
} __packed;
static_assert(sizeof(struct vballoon_walk_header) == 16);

/* Body of BEGIN: how the walk is going to be done, and what the guest has */
struct vballoon_walk_begin {
	__le64 time_ns;
	__le64 managed_pages;
	__le64 free_pages;
	__le32 page_shift;
	__le32 min_order;
	__le32 max_order;
	__le32 nr_zones;
	__le32 slice_ns;
	__le32 layout_id;
} __packed;
static_assert(sizeof(struct vballoon_walk_begin) == 48);

/* One range of free pages: [pfn, pfn + num) in units of 4096 bytes */
struct vballoon_walk_range {
	__le64 pfn;
	__le64 num;
} __packed;
static_assert(sizeof(struct vballoon_walk_range) == 16);

/* Body of END: what the round came to */
struct vballoon_walk_end {
	__le64 time_ns;
	__le64 duration_ns;
	__le64 blocks;
	__le64 ranges;
	__le64 pages;
	__le64 free_pages;
	__le32 longest_hold_ns;
	__le32 buffers;
	__le32 slices;
	__le32 result;
} __packed;
static_assert(sizeof(struct vballoon_walk_end) == 64);

/* Body of MEMMAP: how to read the guest's page structures in its memory */
struct vballoon_walk_memmap {
	__le64 witness_value;
	__le64 witness_pfn;
	__le64 base;
	__le32 layout_id;
	__le32 nr_buffers;
	__le32 nr_runs;
	__le32 page_shift;
	__le32 size;
	__le32 section_pages;
	__le32 max_order;
	__le32 type_offset;
	__le32 type_mask;
	__le32 type_value;
	__le32 order_offset;
	__le32 refcount_offset;
	__le32 list_offset;
	__le32 flags_offset;
	__le32 node_shift;
	__le32 node_mask;
	__le32 zone_shift;
	__le32 zone_mask;
} __packed;
static_assert(sizeof(struct vballoon_walk_memmap) == 96);

/* The page structures of guest pages [pfn, pfn + num) of one node and zone */
struct vballoon_walk_memmap_run {
	__le64 pfn;
	__le64 num;
	__le64 addr;
	__le32 node;
	__le32 zone;
} __packed;
static_assert(sizeof(struct vballoon_walk_memmap_run) == 32);

#endif /* VBALLOON_WALK_WIRE_H */
