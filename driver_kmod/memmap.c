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
#include <linux/jump_label.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/reboot.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "vbw.h"

#define RUN_LEN ((unsigned int)sizeof(struct vballoon_walk_memmap_run))
#define FIXED_LEN ((unsigned int)(sizeof(struct vballoon_walk_header) + \
				  sizeof(struct vballoon_walk_memmap)))
#define RUNS_PER_BUFFER ((VBW_BUFFER_SIZE - FIXED_LEN) / RUN_LEN)

/*
 * Pages whose structures are looked up together. Their structures fill whole
 * pages of the memory map: one where the size of a structure divides that of a
 * page, else as many as are needed for any size that is a multiple of 8.
 */
#define UNIT_PAGES (PAGE_SIZE % sizeof(struct page) ? PAGE_SIZE / 8 : \
		    PAGE_SIZE / sizeof(struct page))

/* Blocks to compare with the kernel's own test before a layout is sent. */
#define SELF_CHECK_BLOCKS 64

/**
 * struct layout - the layout in force; under layout_lock
 * @witness: our page
 * @id: of this layout, 0 when there is none
 * @last_id: of the last layout there was
 * @offlining: memory is going offline, or this kernel; no layout can be made
 * @partial: some memory is not in @runs
 * @runs: the runs
 * @nr: how many
 * @max: room in @runs
 */
static struct layout {
	struct page *witness;
	u32 id;
	u32 last_id;
	unsigned int offlining;
	bool partial;
	struct vballoon_walk_memmap_run *runs;
	unsigned int nr;
	unsigned int max;
} layout;

static DEFINE_MUTEX(layout_lock);
static LIST_HEAD(sessions);

/* Pages of one node and zone whose structures are contiguous. */
struct piece {
	unsigned long pfn;
	unsigned long num;
	phys_addr_t addr;
	u32 node;
	u32 zone;
};

static u32 page_type_word(const struct page *page)
{
	return READ_ONCE(*(const u32 *)&page->_mapcount);
}

/* Callback of a walk: what we tell about free blocks has to be true of them. */
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

#ifdef CONFIG_SPARSEMEM_VMEMMAP
static phys_addr_t memmap_phys(const void *address)
{
#ifdef CONFIG_X86
	return slow_virt_to_phys((void *)address);
#else
	return page_to_phys(vmalloc_to_page(address)) + offset_in_page(address);
#endif
}

static u64 memmap_base(void)
{
	return (u64)(unsigned long)pfn_to_page(0);
}

static bool layout_possible(void)
{
#ifdef VBW_HAVE_HVO_KEY
	/* Huge pages give their page structures back: structures may move. */
	if (static_branch_unlikely(&hugetlb_optimize_vmemmap_key))
		return false;
#endif
	return true;
}
#else
static phys_addr_t memmap_phys(const void *address)
{
	return virt_to_phys((void *)address);
}

static u64 memmap_base(void)
{
	return 0;
}

static bool layout_possible(void)
{
	return false;
}
#endif

static bool contiguous(unsigned long pfn)
{
	const void *first = pfn_to_page(pfn);
	const phys_addr_t addr = memmap_phys(first);
	unsigned long offset;

	for (offset = PAGE_SIZE; offset < UNIT_PAGES * sizeof(struct page); offset += PAGE_SIZE)
		if (memmap_phys(first + offset) != addr + offset)
			return false;
	return true;
}

static bool same_place(const struct page *a, const struct page *b)
{
	return page_to_nid(a) == page_to_nid(b) && page_zonenum(a) == page_zonenum(b);
}

/*
 * The first page from @pfn to @end of another node or zone, or @end. Where memory
 * ends within a unit, the structures behind it may be of the zone that comes next.
 */
static unsigned long place_end(unsigned long pfn, unsigned long end)
{
	const struct page *first = pfn_to_page(pfn);

	if (same_place(first, pfn_to_page(end - 1)))
		return end;
	do {
		pfn++;
	} while (same_place(first, pfn_to_page(pfn)));
	return pfn;
}

static int add_run(const struct piece *piece)
{
	struct vballoon_walk_memmap_run *grown;
	unsigned int max = max(2 * layout.max, 64u);

	if (layout.nr == layout.max) {
		grown = kvmalloc_array(max, RUN_LEN, GFP_KERNEL);
		if (!grown)
			return -ENOMEM;
		if (layout.nr)
			memcpy(grown, layout.runs, layout.nr * RUN_LEN);
		kvfree(layout.runs);
		layout.runs = grown;
		layout.max = max;
	}
	layout.runs[layout.nr++] = (struct vballoon_walk_memmap_run){
		.pfn = cpu_to_le64(piece->pfn),
		.num = cpu_to_le64(piece->num),
		.addr = cpu_to_le64(piece->addr),
		.node = cpu_to_le32(piece->node),
		.zone = cpu_to_le32(piece->zone),
	};
	return 0;
}

static int add_piece(const struct piece *piece)
{
	struct vballoon_walk_memmap_run *run;
	u64 num;

	if (!layout.nr)
		return add_run(piece);
	run = &layout.runs[layout.nr - 1];
	num = le64_to_cpu(run->num);
	if (le64_to_cpu(run->pfn) + num != piece->pfn ||
	    le64_to_cpu(run->addr) + num * sizeof(struct page) != piece->addr ||
	    le32_to_cpu(run->node) != piece->node || le32_to_cpu(run->zone) != piece->zone)
		return add_run(piece);
	run->num = cpu_to_le64(num + piece->num);
	return 0;
}

static int add_unit(int nid, unsigned long pfn)
{
	const unsigned long end = pfn + UNIT_PAGES;
	const phys_addr_t addr = memmap_phys(pfn_to_page(pfn));
	const unsigned long start = pfn;
	unsigned long next;
	int err;

	for (; pfn < end; pfn = next) {
		const struct page *page = pfn_to_page(pfn);

		next = place_end(pfn, end);
		if (page_to_nid(page) != nid)
			continue;
		err = add_piece(&(struct piece){
			.pfn = pfn,
			.num = next - pfn,
			.addr = addr + (pfn - start) * sizeof(struct page),
			.node = nid,
			.zone = page_zonenum(page),
		});
		if (err)
			return err;
	}
	return 0;
}

static int add_node(int nid)
{
	unsigned long pfn = ALIGN_DOWN(node_start_pfn(nid), UNIT_PAGES);
	int err;

	for (; pfn < node_end_pfn(nid); pfn += UNIT_PAGES) {
		if (!(pfn % PAGES_PER_SECTION))
			cond_resched();
		if (!pfn_to_online_page(pfn))
			continue;
		if (!contiguous(pfn)) {
			layout.partial = true;
			continue;
		}
		err = add_unit(nid, pfn);
		if (err)
			return err;
	}
	return 0;
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
	layout.nr = 0;
	layout.partial = false;
	set_witness();
}

/* Makes the layout if there is none. */
static int make_layout(void)
{
	int nid, err;

	if (layout.id)
		return 0;
	if (layout.offlining)
		return -EAGAIN;
	if (!layout_possible())
		return -EOPNOTSUPP;
	drop_layout();
	if (!self_check())
		return -EINVAL;
	for_each_online_node(nid) {
		err = add_node(nid);
		if (err)
			return err;
	}
	layout.id = ++layout.last_id ?: ++layout.last_id;
	return 0;
}

static void describe(struct vballoon_walk_memmap *memmap)
{
	*memmap = (struct vballoon_walk_memmap){
		.witness_value = cpu_to_le64(page_private(layout.witness)),
		.witness_pfn = cpu_to_le64(page_to_pfn(layout.witness)),
		.base = cpu_to_le64(memmap_base()),
		.layout_id = cpu_to_le32(layout.id),
		.nr_buffers = cpu_to_le32(DIV_ROUND_UP(layout.nr, RUNS_PER_BUFFER)),
		.nr_runs = cpu_to_le32(layout.nr),
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
	if (!layout_possible() && layout.id)
		drop_layout();
	err = make_layout();
	if (!err) {
		describe(memmap);
		*flags = layout.partial ? BIT(VBALLOON_WALK_MEMMAP_F_PARTIAL) : 0;
		runs = kvmalloc_array(layout.nr, RUN_LEN, GFP_KERNEL);
		if (runs)
			memcpy(runs, layout.runs, layout.nr * RUN_LEN);
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
 * vbw_memmap_attach - tell a session when the memory map changes
 * @session: the session
 */
void vbw_memmap_attach(struct vbw_session *session)
{
	mutex_lock(&layout_lock);
	list_add(&session->node, &sessions);
	mutex_unlock(&layout_lock);
}

/**
 * vbw_memmap_detach - undo vbw_memmap_attach()
 * @session: the session
 */
void vbw_memmap_detach(struct vbw_session *session)
{
	mutex_lock(&layout_lock);
	list_del_init(&session->node);
	mutex_unlock(&layout_lock);
}

/*
 * Runs with memory hotplug locked. While memory goes offline its structures may
 * be freed, so there is no layout from before until it is clear what remains.
 */
static int memory_changed(struct notifier_block *nb, unsigned long action, void *arg)
{
	struct vbw_session *session;

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
	drop_layout();
	if (action != MEM_GOING_OFFLINE)
		list_for_each_entry(session, &sessions, node)
			vbw_session_memory_changed(session);
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
	kvfree(layout.runs);
}
