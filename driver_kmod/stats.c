// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory statistics. The queue works the other way round: the driver puts a
 * buffer there at once, and the host uses it when it wants a newer one.
 */
#include <linux/mm.h>
#include <linux/swap.h>

#include "compat.h"
#include "stats.h"

static u64 bytes(u64 pages)
{
	return pages << PAGE_SHIFT;
}

static void add(struct vbw_stats *stats, unsigned int *n, u16 tag, u64 val)
{
	if (WARN_ON_ONCE(*n >= ARRAY_SIZE(stats->entries)))
		return;
	stats->entries[*n].tag = cpu_to_le16(tag);
	stats->entries[*n].val = cpu_to_le64(val);
	++*n;
}

static void add_events(struct vbw_stats *stats, unsigned int *n)
{
#ifdef CONFIG_VM_EVENT_COUNTERS
	unsigned long events[NR_VM_EVENT_ITEMS];
	unsigned long stalls = 0;
	int zone;

	all_vm_events(events);
	for (zone = 0; zone < MAX_NR_ZONES; zone++)
		stalls += events[ALLOCSTALL_NORMAL - ZONE_NORMAL + zone];
	add(stats, n, VBALLOON_S_SWAP_IN, bytes(events[PSWPIN]));
	add(stats, n, VBALLOON_S_SWAP_OUT, bytes(events[PSWPOUT]));
	add(stats, n, VBALLOON_S_MAJFLT, events[PGMAJFAULT]);
	add(stats, n, VBALLOON_S_MINFLT, events[PGFAULT]);
	add(stats, n, VBALLOON_S_OOM_KILL, events[OOM_KILL]);
	add(stats, n, VBALLOON_S_ALLOC_STALL, stalls);
	add(stats, n, VBALLOON_S_ASYNC_SCAN, bytes(vbw_scan_count(events, PGSCAN_KSWAPD)));
	add(stats, n, VBALLOON_S_DIRECT_SCAN, bytes(vbw_scan_count(events, PGSCAN_DIRECT)));
	add(stats, n, VBALLOON_S_ASYNC_RECLAIM, bytes(vbw_scan_count(events, PGSTEAL_KSWAPD)));
	add(stats, n, VBALLOON_S_DIRECT_RECLAIM, bytes(vbw_scan_count(events, PGSTEAL_DIRECT)));
#ifdef CONFIG_HUGETLB_PAGE
	add(stats, n, VBALLOON_S_HTLB_PGALLOC, events[HTLB_BUDDY_PGALLOC]);
	add(stats, n, VBALLOON_S_HTLB_PGFAIL, events[HTLB_BUDDY_PGALLOC_FAIL]);
#endif
#endif
}

/* Fills in all entries; returns the bytes of those that there are. */
static unsigned int collect(struct vbw_stats *stats)
{
	struct sysinfo info;
	unsigned int n = 0;

	add_events(stats, &n);
	si_meminfo(&info);
	add(stats, &n, VBALLOON_S_MEMFREE, bytes(info.freeram));
	add(stats, &n, VBALLOON_S_MEMTOT, bytes(info.totalram));
	add(stats, &n, VBALLOON_S_AVAIL, bytes(si_mem_available()));
	add(stats, &n, VBALLOON_S_CACHES, bytes(global_node_page_state(NR_FILE_PAGES)));
	return n * sizeof(stats->entries[0]);
}

static int offer(struct vbw_stats *stats)
{
	struct scatterlist sg;
	int err;

	sg_init_one(&sg, stats->entries, collect(stats));
	err = virtqueue_add_outbuf(stats->vq, &sg, 1, stats, GFP_KERNEL);
	if (!err)
		virtqueue_kick(stats->vq);
	return err;
}

static void refill(struct work_struct *work)
{
	struct vbw_stats *stats = container_of(work, struct vbw_stats, refill);
	unsigned int len;

	if (virtqueue_get_buf(stats->vq, &len))
		offer(stats);
}

/**
 * vbw_stats_request - the host has used the buffer and wants newer numbers
 * @stats: the statistics
 */
void vbw_stats_request(struct vbw_stats *stats)
{
	vbw_queue_work(stats->shared, system_freezable_wq, &stats->refill);
}

/**
 * vbw_stats_setup - before anything else of this file
 * @stats: to be filled in
 * @shared: of the device
 */
void vbw_stats_setup(struct vbw_stats *stats, struct vbw_shared *shared)
{
	stats->shared = shared;
	INIT_WORK(&stats->refill, refill);
}

/**
 * vbw_stats_prime - put the first buffer into the queue
 * @stats: the statistics
 *
 * Return: 0 or a negative error number.
 */
int vbw_stats_prime(struct vbw_stats *stats)
{
	return offer(stats);
}

/**
 * vbw_stats_cancel - wait for the work; the device stops
 * @stats: the statistics
 */
void vbw_stats_cancel(struct vbw_stats *stats)
{
	cancel_work_sync(&stats->refill);
}
