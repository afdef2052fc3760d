/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM vballoon_walk

#if !defined(VBW_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define VBW_TRACE_H

#include <linux/tracepoint.h>

#include "push.h"
#include "walk.h"

/* One event for each round, when its END is with the device. */
TRACE_EVENT(vbw_walk,
	    TP_PROTO(u32 round, u32 min_order, int result, const struct free_walk *walk,
		     const struct vbw_push *push, u64 duration_ns),
	    TP_ARGS(round, min_order, result, walk, push, duration_ns),
	    TP_STRUCT__entry(__field(u32, round)
			     __field(u32, min_order)
			     __field(int, result)
			     __field(u64, blocks)
			     __field(u64, ranges)
			     __field(u64, pages)
			     __field(u64, duration_ns)
			     __field(u32, longest_hold_ns)
			     __field(u32, slices)
			     __field(u32, buffers)
	    ),
	    TP_fast_assign(__entry->round = round;
			   __entry->min_order = min_order;
			   __entry->result = result;
			   __entry->blocks = walk->blocks;
			   __entry->ranges = push->sent_ranges;
			   __entry->pages = push->sent_pages;
			   __entry->duration_ns = duration_ns;
			   __entry->longest_hold_ns = walk->longest_hold_ns;
			   __entry->slices = walk->slices;
			   __entry->buffers = push->sent_buffers;
	    ),
	    TP_printk("round=%u min_order=%u result=%d blocks=%llu ranges=%llu pages=%llu duration_ns=%llu longest_hold_ns=%u slices=%u buffers=%u",
		      __entry->round, __entry->min_order, __entry->result, __entry->blocks,
		      __entry->ranges, __entry->pages, __entry->duration_ns,
		      __entry->longest_hold_ns, __entry->slices, __entry->buffers)
);

#endif /* VBW_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
