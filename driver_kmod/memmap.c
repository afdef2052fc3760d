// SPDX-License-Identifier: GPL-2.0-only
/*
 * The layout of the memory map: where this kernel keeps its page structures,
 * and how to read in them which pages are free.
 *
 * The device uses it on a stopped guest, perhaps after this device was
 * unplugged, so a layout has to be recognisable as void by reading guest memory
 * alone. That is what the witness is for: a page of ours whose structure
 * carries a random number. It lives as long as the module and changes its number
 * before memory goes offline, and before another kernel follows this one: a
 * reset or kexec leaves memory as it is, our page structures with it.
 */
#include <linux/gfp.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/reboot.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "memmap.h"
#include "push.h"
#include "runs.h"
#include "walk.h"

#define RUN_LEN ((unsigned int)sizeof(struct vballoon_walk_memmap_run))
#define FIXED_LEN ((unsigned int)(sizeof(struct vballoon_walk_header) + \
				  sizeof(struct vballoon_walk_memmap)))
#define RUNS_PER_BUFFER ((VBW_BUFFER_SIZE - FIXED_LEN) / RUN_LEN)

/* Blocks to compare with the kernel's own test before a layout is sent. */
#define SELF_CHECK_BLOCKS 64

/**
 * struct layout - the layout in force; under layout_lock
 * @witness: our page
 * @id: of this layout, 0 when there is none
 * @last_id: of the last layout there was
 * @grown: memory has come that is in no run; the layout still holds
 * @offlining: memory is going offline, or this kernel; no layout can be made
 * @runs: where the structures are
 */
static struct layout {
	struct page *witness;
	u32 id;
	u32 last_id;
	bool grown;
	unsigned int offlining;
	struct vbw_runs runs;
} layout;

static DEFINE_MUTEX(layout_lock);
static LIST_HEAD(listeners);

static u32 page_type_word(const struct page *page)
{
	return READ_ONCE(*(const u32 *)&page->_mapcount);
}

/* Callback of a walk: what a layout says about free blocks has to be true of them. */
static int check_block(void *opaque, unsigned long pfn, unsigned long num)
{
	const struct page *page = pfn_to_page(pfn);
	unsigned int *left = opaque;

	if (!PageBuddy((struct page *)page) || page_ref_count(page) ||
	    (page_type_word(page) & VBW_BUDDY_MASK) != VBW_BUDDY_VALUE ||
	    page_private(page) > VBW_MAX_ORDER || num != 1UL << page_private(page))
		return -EINVAL;
	return --*left ? 0 : 1;
}

static bool self_check(void)
{
	unsigned int left = SELF_CHECK_BLOCKS;

	if ((page_type_word(layout.witness) & VBW_BUDDY_MASK) == VBW_BUDDY_VALUE)
		return false;
	return walk_free_mem_block(&left, 0, check_block) >= 0;
}

static void set_witness(void)
{
	unsigned long value;

	do {
		value = get_random_long();
	} while (value == page_private(layout.witness) || value <= U32_MAX);
	set_page_private(layout.witness, value);
}

static void drop_layout(void)
{
	layout.id = 0;
	layout.grown = false;
	set_witness();
}

/* Makes the layout if there is none that describes all memory. */
static int make_layout(void)
{
	int err;

	if (layout.id && !layout.grown)
		return 0;
	if (layout.offlining)
		return -EAGAIN;
	if (!vbw_runs_possible())
		return -EOPNOTSUPP;
	drop_layout();
	if (!self_check())
		return -EINVAL;
	err = vbw_runs_collect(&layout.runs);
	if (err)
		return err;
	layout.id = ++layout.last_id ?: ++layout.last_id;
	return 0;
}

static void describe(struct vballoon_walk_memmap *memmap)
{
	*memmap = (struct vballoon_walk_memmap){
		.witness_value = cpu_to_le64(page_private(layout.witness)),
		.witness_pfn = cpu_to_le64(page_to_pfn(layout.witness)),
		.base = cpu_to_le64(vbw_runs_base()),
		.layout_id = cpu_to_le32(layout.id),
		.nr_buffers = cpu_to_le32(DIV_ROUND_UP(layout.runs.nr, RUNS_PER_BUFFER)),
		.nr_runs = cpu_to_le32(layout.runs.nr),
		.page_shift = cpu_to_le32(PAGE_SHIFT),
		.size = cpu_to_le32(sizeof(struct page)),
		.section_pages = cpu_to_le32(PAGES_PER_SECTION),
		.max_order = cpu_to_le32(VBW_MAX_ORDER),
		.type_offset = cpu_to_le32(offsetof(struct page, _mapcount)),
		.type_mask = cpu_to_le32(VBW_BUDDY_MASK),
		.type_value = cpu_to_le32(VBW_BUDDY_VALUE),
		.order_offset = cpu_to_le32(offsetof(struct page, private)),
		.refcount_offset = cpu_to_le32(offsetof(struct page, _refcount)),
		.list_offset = cpu_to_le32(offsetof(struct page, buddy_list)),
		.flags_offset = cpu_to_le32(offsetof(struct page, flags)),
		.node_shift = cpu_to_le32(NODES_PGSHIFT),
		.node_mask = cpu_to_le32(NODES_MASK),
		.zone_shift = cpu_to_le32(ZONES_PGSHIFT),
		.zone_mask = cpu_to_le32(ZONES_MASK),
	};
}

static int send_runs(struct vbw_push *push, const struct vballoon_walk_memmap *memmap,
		     const struct vballoon_walk_memmap_run *runs, u16 flags)
{
	const unsigned int nr = le32_to_cpu(memmap->nr_runs);
	unsigned int i, num;
	int err;

	for (i = 0; i < nr; i += num) {
		num = min(nr - i, RUNS_PER_BUFFER);
		err = vbw_push_message(push, VBALLOON_WALK_MEMMAP, flags, memmap, sizeof(*memmap),
				       &runs[i], RUN_LEN, num);
		if (err)
			return err;
	}
	return 0;
}

/* A copy of the layout in force, so that nobody waits for the device under the lock. */
static struct vballoon_walk_memmap_run *copy_layout(struct vballoon_walk_memmap *memmap, u16 *flags)
{
	struct vballoon_walk_memmap_run *runs = NULL;
	int err;

	mutex_lock(&layout_lock);
	if (!vbw_runs_possible() && layout.id)
		drop_layout();
	err = make_layout();
	if (!err) {
		describe(memmap);
		*flags = layout.runs.partial ? BIT(VBALLOON_WALK_MEMMAP_F_PARTIAL) : 0;
		runs = kvmalloc_array(layout.runs.nr, RUN_LEN, GFP_KERNEL);
		if (runs)
			memcpy(runs, layout.runs.run, layout.runs.nr * RUN_LEN);
	}
	mutex_unlock(&layout_lock);
	if (err)
		return ERR_PTR(err);
	return runs ?: ERR_PTR(-ENOMEM);
}

/**
 * vbw_memmap_send - send the layout in force
 * @push: where to; the series has been started
 *
 * Return: 0; -EOPNOTSUPP where this kernel's memory map cannot be described,
 * -EAGAIN while memory goes offline, another negative error number.
 */
int vbw_memmap_send(struct vbw_push *push)
{
	struct vballoon_walk_memmap_run *runs;
	struct vballoon_walk_memmap memmap;
	u16 flags;
	int err;

	runs = copy_layout(&memmap, &flags);
	if (IS_ERR(runs))
		return PTR_ERR(runs);
	err = send_runs(push, &memmap, runs, flags);
	kvfree(runs);
	return err;
}

/**
 * vbw_memmap_layout_id - the layout in force
 *
 * Return: its id, or 0.
 */
u32 vbw_memmap_layout_id(void)
{
	return READ_ONCE(layout.id);
}

/**
 * vbw_memmap_listen - call a listener when the memory map changes
 * @listener: the listener
 */
void vbw_memmap_listen(struct vbw_memmap_listener *listener)
{
	mutex_lock(&layout_lock);
	list_add(&listener->node, &listeners);
	mutex_unlock(&layout_lock);
}

/**
 * vbw_memmap_unlisten - undo vbw_memmap_listen()
 * @listener: the listener; it is not called any more
 */
void vbw_memmap_unlisten(struct vbw_memmap_listener *listener)
{
	mutex_lock(&layout_lock);
	list_del_init(&listener->node);
	mutex_unlock(&layout_lock);
}

/*
 * Runs with memory hotplug locked. While memory goes offline its structures may
 * be freed, so there is no layout from before until it is clear what remains.
 * Memory that comes makes no layout wrong: it is copied until it is described.
 */
static int memory_changed(struct notifier_block *nb, unsigned long action, void *arg)
{
	struct vbw_memmap_listener *listener;

	switch (action) {
	case MEM_GOING_OFFLINE:
	case MEM_CANCEL_OFFLINE:
	case MEM_OFFLINE:
	case MEM_ONLINE:
		break;
	default:
		return NOTIFY_OK;
	}
	mutex_lock(&layout_lock);
	if (action == MEM_GOING_OFFLINE)
		layout.offlining++;
	else if (action != MEM_ONLINE && layout.offlining)
		layout.offlining--;
	if (action == MEM_ONLINE)
		layout.grown = true;
	else
		drop_layout();
	if (action != MEM_GOING_OFFLINE)
		list_for_each_entry(listener, &listeners, node)
			listener->changed(listener);
	mutex_unlock(&layout_lock);
	return NOTIFY_OK;
}

static struct notifier_block memory_notifier = {
	.notifier_call = memory_changed,
};

/* No layout may outlive this kernel. There is no way back from here. */
static int kernel_ends(struct notifier_block *nb, unsigned long action, void *arg)
{
	mutex_lock(&layout_lock);
	layout.offlining++;
	drop_layout();
	mutex_unlock(&layout_lock);
	return NOTIFY_OK;
}

static struct notifier_block reboot_notifier = {
	.notifier_call = kernel_ends,
};

/**
 * vbw_memmap_init - make the witness; once, when the module is loaded
 *
 * Return: 0 or a negative error number.
 */
int vbw_memmap_init(void)
{
	int err;

	layout.witness = alloc_page(GFP_KERNEL);
	if (!layout.witness)
		return -ENOMEM;
	set_witness();
	err = register_memory_notifier(&memory_notifier);
	if (err)
		goto free;
	err = register_reboot_notifier(&reboot_notifier);
	if (err)
		goto unregister;
	return 0;

unregister:
	unregister_memory_notifier(&memory_notifier);
free:
	__free_page(layout.witness);
	return err;
}

/**
 * vbw_memmap_exit - free the witness; every layout ceases to hold
 */
void vbw_memmap_exit(void)
{
	unregister_reboot_notifier(&reboot_notifier);
	unregister_memory_notifier(&memory_notifier);
	set_page_private(layout.witness, 0);
	__free_page(layout.witness);
	vbw_runs_free(&layout.runs);
}
