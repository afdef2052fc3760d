// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where the page structures of this kernel are: runs of pages of one node and
 * zone whose structures follow one another in physical memory.
 */
#include <linux/jump_label.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/page-flags.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "runs.h"

#define RUN_LEN ((unsigned int)sizeof(struct vballoon_walk_memmap_run))

/*
 * Pages whose structures are looked up together. Their structures fill whole
 * pages of the memory map: one where the size of a structure divides that of a
 * page, else as many as are needed for any size that is a multiple of 8.
 */
#define UNIT_PAGES (PAGE_SIZE % sizeof(struct page) ? PAGE_SIZE / 8 : \
		    PAGE_SIZE / sizeof(struct page))

/* Pages of one node and zone whose structures are contiguous. */
struct piece {
	unsigned long pfn;
	unsigned long num;
	phys_addr_t addr;
	u32 node;
	u32 zone;
};

#ifdef CONFIG_SPARSEMEM_VMEMMAP
static phys_addr_t memmap_phys(const void *address)
{
#ifdef CONFIG_X86
	return slow_virt_to_phys((void *)address);
#else
	return page_to_phys(vmalloc_to_page(address)) + offset_in_page(address);
#endif
}

u64 vbw_runs_base(void)
{
	return (u64)(unsigned long)pfn_to_page(0);
}

bool vbw_runs_possible(void)
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

u64 vbw_runs_base(void)
{
	return 0;
}

bool vbw_runs_possible(void)
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
 * ends within a unit, the structures after it may be of the zone that comes next.
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

static int add_run(struct vbw_runs *runs, const struct piece *piece)
{
	struct vballoon_walk_memmap_run *grown;
	unsigned int max = max(2 * runs->max, 64u);

	if (runs->nr == runs->max) {
		grown = kvmalloc_array(max, RUN_LEN, GFP_KERNEL);
		if (!grown)
			return -ENOMEM;
		if (runs->nr)
			memcpy(grown, runs->run, runs->nr * RUN_LEN);
		kvfree(runs->run);
		runs->run = grown;
		runs->max = max;
	}
	runs->run[runs->nr++] = (struct vballoon_walk_memmap_run){
		.pfn = cpu_to_le64(piece->pfn),
		.num = cpu_to_le64(piece->num),
		.addr = cpu_to_le64(piece->addr),
		.node = cpu_to_le32(piece->node),
		.zone = cpu_to_le32(piece->zone),
	};
	return 0;
}

static int add_piece(struct vbw_runs *runs, const struct piece *piece)
{
	struct vballoon_walk_memmap_run *run;
	u64 num;

	if (!runs->nr)
		return add_run(runs, piece);
	run = &runs->run[runs->nr - 1];
	num = le64_to_cpu(run->num);
	if (le64_to_cpu(run->pfn) + num != piece->pfn ||
	    le64_to_cpu(run->addr) + num * sizeof(struct page) != piece->addr ||
	    le32_to_cpu(run->node) != piece->node || le32_to_cpu(run->zone) != piece->zone)
		return add_run(runs, piece);
	run->num = cpu_to_le64(num + piece->num);
	return 0;
}

static int add_unit(struct vbw_runs *runs, int nid, unsigned long pfn)
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
		err = add_piece(runs, &(struct piece){
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

static int add_node(struct vbw_runs *runs, int nid)
{
	unsigned long pfn = ALIGN_DOWN(node_start_pfn(nid), UNIT_PAGES);
	int err;

	for (; pfn < node_end_pfn(nid); pfn += UNIT_PAGES) {
		if (!(pfn % PAGES_PER_SECTION))
			cond_resched();
		if (!pfn_to_online_page(pfn))
			continue;
		if (!contiguous(pfn)) {
			runs->partial = true;
			continue;
		}
		err = add_unit(runs, nid, pfn);
		if (err)
			return err;
	}
	return 0;
}

/**
 * vbw_runs_collect - find all runs
 * @runs: replaced
 *
 * Context: memory must not go offline meanwhile.
 * Return: 0 or -ENOMEM.
 */
int vbw_runs_collect(struct vbw_runs *runs)
{
	int nid, err;

	runs->nr = 0;
	runs->partial = false;
	for_each_online_node(nid) {
		err = add_node(runs, nid);
		if (err)
			return err;
	}
	return 0;
}

/**
 * vbw_runs_free - free the runs
 * @runs: the runs
 */
void vbw_runs_free(struct vbw_runs *runs)
{
	kvfree(runs->run);
	*runs = (struct vbw_runs){};
}
