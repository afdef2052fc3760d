/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Differences between kernel releases, and nothing else. VBW_HAVE_* come from
 * have.sh, which asks the compiler; the commit that made the difference is named
 * where it is known.
 */
#ifndef VBW_COMPAT_H
#define VBW_COMPAT_H

#ifndef CONFIG_64BIT
#error "vballoon_walk needs a 64-bit kernel"
#endif

#ifdef VBW_HAVE_BALLOON_H
#include <linux/balloon.h>
#else
#include <linux/balloon_compaction.h>
#endif
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/page-flags.h>

/*
 * The largest order, whether MAX_ORDER (and its meaning) or MAX_PAGE_ORDER is
 * what the release calls it: 23baf831a32c ("mm, treewide: redefine MAX_ORDER
 * sanely"), 6.4, 5e0a760b4441 ("mm, treewide: rename MAX_ORDER to
 * MAX_PAGE_ORDER"), 6.8.
 */
#define VBW_MAX_ORDER ilog2(MAX_ORDER_NR_PAGES)

/*
 * How page_type says "head of a free block": 4ffca5a96678 ("mm: support only
 * one page_type per page"), 6.12, made the top byte a number; before, a bit
 * was cleared in a word whose top bits are set.
 */
#ifdef VBW_HAVE_PAGE_TYPE_NUMBER
#define VBW_BUDDY_MASK 0xff000000u
#define VBW_BUDDY_VALUE ((u32)PGTY_buddy << 24)
#else
#define VBW_BUDDY_MASK ((u32)(PAGE_TYPE_BASE | PG_buddy))
#define VBW_BUDDY_VALUE ((u32)PAGE_TYPE_BASE)
#endif

/* The reclaim counters moved from events to node statistics in 7.x. */
#ifdef VBW_HAVE_NODE_SCAN
#define vbw_scan_count(events, item) ((void)(events), global_node_page_state(item))
#else
#define vbw_scan_count(events, item) ((events)[item])
#endif

#if IS_ENABLED(CONFIG_BALLOON_COMPACTION) || IS_ENABLED(CONFIG_BALLOON_MIGRATION)
#define VBW_BALLOON_MIGRATION 1
#endif

#endif /* VBW_COMPAT_H */
