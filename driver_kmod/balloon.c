// SPDX-License-Identifier: GPL-2.0-only
/*
 * Inflating and deflating: memory goes to the host and comes back.
 *
 * The balloon counts in units of 4096 bytes whatever the page size is. One
 * request carries up to VBW_PFNS_MAX of them, and is waited for.
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/oom.h>

#include "balloon.h"
#include "compat.h"

#define OOM_PAGES 256		/* of 4096 bytes, given back at a time */
#define OOM_PRIORITY 80		/* before the killing starts */
#define RETRY_MS 200		/* after an allocation failed */
#define PUT_BACK_MS 20		/* until compaction has put pages back */

/* Balloon pages count as memory the guest has not, unless OOM brings them back. */
static bool adjusts_managed(struct vbw_balloon *balloon)
{
	return !vbw_has(balloon->shared, VBALLOON_F_DEFLATE_ON_OOM);
}

static void count_managed(struct vbw_balloon *balloon, struct page *page, long change)
{
#ifndef VBW_HAVE_BALLOON_MANAGED
	if (adjusts_managed(balloon))
		adjust_managed_page_count(page, change);
#endif
}

static bool answered(struct virtqueue *vq)
{
	unsigned int len;

	return virtqueue_get_buf(vq, &len) || virtqueue_is_broken(vq);
}

/* Sends the page numbers collected, and waits for the host. Under lock. */
static void tell_host(struct vbw_balloon *balloon, struct virtqueue *vq)
{
	struct scatterlist sg;

	if (!balloon->num_pfns)
		return;
	sg_init_one(&sg, balloon->pfns, balloon->num_pfns * sizeof(balloon->pfns[0]));
	if (virtqueue_add_outbuf(vq, &sg, 1, balloon, GFP_KERNEL))
		return; /* broken; an empty queue always has room */
	virtqueue_kick(vq);
	wait_event(balloon->shared->acked, answered(vq));
}

static void add_pfns(struct vbw_balloon *balloon, struct page *page)
{
	u32 pfn = page_to_pfn(page) * VBW_PFNS_PER_PAGE;
	unsigned int i;

	for (i = 0; i < VBW_PFNS_PER_PAGE; i++)
		balloon->pfns[balloon->num_pfns++] = cpu_to_le32(pfn + i);
}

static void allocate_pages(struct vbw_balloon *balloon, u32 num, struct list_head *pages)
{
	struct page *page;
	u32 have;

	for (have = 0; have < num; have += VBW_PFNS_PER_PAGE) {
		page = balloon_page_alloc();
		if (!page) {
			dev_info_ratelimited(&balloon->shared->vdev->dev,
					     "no memory left for the balloon\n");
			msleep(RETRY_MS);
			return;
		}
		list_add(&page->lru, pages);
	}
}

/* Gives up to @num units to the host; returns how many it was. */
static u32 inflate(struct vbw_balloon *balloon, u32 num)
{
	struct page *page, *next;
	LIST_HEAD(pages);
	u32 done;

	/* Not under lock: an allocation may need the balloon to shrink. */
	allocate_pages(balloon, min_t(u32, num, VBW_PFNS_MAX), &pages);
	mutex_lock(&balloon->lock);
	balloon->num_pfns = 0;
	list_for_each_entry_safe(page, next, &pages, lru) {
		list_del(&page->lru);
		balloon_page_enqueue(&balloon->info, page);
		add_pfns(balloon, page);
		count_managed(balloon, page, -1);
		balloon->num_pages += VBW_PFNS_PER_PAGE;
	}
	done = balloon->num_pfns;
	tell_host(balloon, balloon->inflate_vq);
	mutex_unlock(&balloon->lock);
	return done;
}

static void release_pages_to_mm(struct vbw_balloon *balloon, struct list_head *pages)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, pages, lru) {
		count_managed(balloon, page, 1);
		list_del(&page->lru);
		put_page(page);
	}
}

/* Takes up to @num units back from the host; returns how many it was. */
static u32 deflate(struct vbw_balloon *balloon, u32 num)
{
	struct page *page;
	LIST_HEAD(pages);
	u32 done;

	mutex_lock(&balloon->lock);
	num = min3(num, (u32)VBW_PFNS_MAX, balloon->num_pages);
	balloon->num_pfns = 0;
	while (balloon->num_pfns < num) {
		page = balloon_page_dequeue(&balloon->info);
		if (!page)
			break;
		add_pfns(balloon, page);
		list_add(&page->lru, &pages);
		balloon->num_pages -= VBW_PFNS_PER_PAGE;
	}
	done = balloon->num_pfns;
	/* Tell first, use then: MUST_TELL_HOST asks for it, and it never hurts. */
	tell_host(balloon, balloon->deflate_vq);
	release_pages_to_mm(balloon, &pages);
	mutex_unlock(&balloon->lock);
	return done;
}

/**
 * vbw_balloon_update_actual - tell the host how large the balloon is
 * @balloon: the balloon
 */
void vbw_balloon_update_actual(struct vbw_balloon *balloon)
{
	u32 actual = balloon->num_pages;

	virtio_cwrite_le(balloon->shared->vdev, struct vballoon_config, actual, &actual);
}

static s64 towards_target(struct vbw_balloon *balloon)
{
	u32 target;

	virtio_cread_le(balloon->shared->vdev, struct vballoon_config, num_pages, &target);
	/* Whole pages, lest it swing between two sizes for ever. */
	return (s64)ALIGN((u64)target, VBW_PFNS_PER_PAGE) - balloon->num_pages;
}

static void resize(struct work_struct *work)
{
	struct vbw_balloon *balloon = container_of(work, struct vbw_balloon, resize);
	s64 diff = towards_target(balloon);

	/* What a device that is gone reads as would be a target of 16 TiB. */
	if (!diff || virtqueue_is_broken(balloon->inflate_vq))
		return;
	if (diff > 0)
		diff -= inflate(balloon, min_t(s64, diff, U32_MAX));
	else
		diff += deflate(balloon, min_t(s64, -diff, U32_MAX));
	vbw_balloon_update_actual(balloon);
	if (diff)
		vbw_queue_work(balloon->shared, system_freezable_wq, work);
}

/**
 * vbw_balloon_changed - the host may want another size
 * @balloon: the balloon
 */
void vbw_balloon_changed(struct vbw_balloon *balloon)
{
	vbw_queue_work(balloon->shared, system_freezable_wq, &balloon->resize);
}

static int out_of_memory_notify(struct notifier_block *nb, unsigned long dummy, void *parm)
{
	struct vbw_balloon *balloon = container_of(nb, struct vbw_balloon, oom);
	unsigned long *freed = parm;
	u32 done = deflate(balloon, OOM_PAGES);

	*freed += done / VBW_PFNS_PER_PAGE;
	if (done)
		vbw_balloon_update_actual(balloon);
	return NOTIFY_OK;
}

#ifdef VBW_BALLOON_MIGRATION
#ifdef VBW_HAVE_BALLOON_MANAGED
/* The core keeps list, references and counts since the balloon header is linux/balloon.h. */
static void migrate_in(struct vbw_balloon *balloon, struct page *newpage, struct page *page) {}
static void migrate_out(struct vbw_balloon *balloon, struct page *page) {}
static void migrate_put(struct page *page) {}
#else
static void migrate_in(struct vbw_balloon *balloon, struct page *newpage, struct page *page)
{
	struct balloon_dev_info *info = &balloon->info;
	unsigned long flags;

	get_page(newpage);
	if (page_zone(page) != page_zone(newpage)) {
		count_managed(balloon, page, 1);
		count_managed(balloon, newpage, -1);
	}
	spin_lock_irqsave(&info->pages_lock, flags);
	balloon_page_insert(info, newpage);
	info->isolated_pages--;
	__count_vm_event(BALLOON_MIGRATE);
	spin_unlock_irqrestore(&info->pages_lock, flags);
}

static void migrate_out(struct vbw_balloon *balloon, struct page *page)
{
	struct balloon_dev_info *info = &balloon->info;
	unsigned long flags;

	spin_lock_irqsave(&info->pages_lock, flags);
#ifdef VBW_HAVE_BALLOON_FINALIZE
	balloon_page_finalize(page);
#else
	balloon_page_delete(page);
#endif
	spin_unlock_irqrestore(&info->pages_lock, flags);
}

static void migrate_put(struct page *page)
{
	put_page(page);
}
#endif

/* Compaction moves a balloon page: the host gets another one instead. */
static int migratepage(struct balloon_dev_info *info, struct page *newpage, struct page *page,
		       enum migrate_mode mode)
{
	struct vbw_balloon *balloon = container_of(info, struct vbw_balloon, info);

	/* Whoever holds the lock may be waiting for memory. */
	if (!mutex_trylock(&balloon->lock))
		return -EAGAIN;
	migrate_in(balloon, newpage, page);
	balloon->num_pfns = 0;
	add_pfns(balloon, newpage);
	tell_host(balloon, balloon->inflate_vq);

	migrate_out(balloon, page);
	balloon->num_pfns = 0;
	add_pfns(balloon, page);
	tell_host(balloon, balloon->deflate_vq);
	mutex_unlock(&balloon->lock);
	migrate_put(page);
	return 0;
}
#endif

/**
 * vbw_balloon_setup - make an empty balloon
 * @balloon: to be filled in
 * @shared: of the device
 */
void vbw_balloon_setup(struct vbw_balloon *balloon, struct vbw_shared *shared)
{
	balloon->shared = shared;
	mutex_init(&balloon->lock);
	balloon_devinfo_init(&balloon->info);
	INIT_WORK(&balloon->resize, resize);
#ifdef VBW_BALLOON_MIGRATION
	balloon->info.migratepage = migratepage;
#endif
}

/**
 * vbw_balloon_start - features are negotiated
 * @balloon: the balloon
 *
 * Return: 0 or a negative error number.
 */
int vbw_balloon_start(struct vbw_balloon *balloon)
{
#ifdef VBW_HAVE_BALLOON_MANAGED
	balloon->info.adjust_managed_page_count = adjusts_managed(balloon);
#endif
	if (!vbw_has(balloon->shared, VBALLOON_F_DEFLATE_ON_OOM))
		return 0;
	balloon->oom.notifier_call = out_of_memory_notify;
	balloon->oom.priority = OOM_PRIORITY;
	return register_oom_notifier(&balloon->oom);
}

/**
 * vbw_balloon_stop - undo vbw_balloon_start()
 * @balloon: the balloon
 */
void vbw_balloon_stop(struct vbw_balloon *balloon)
{
	if (vbw_has(balloon->shared, VBALLOON_F_DEFLATE_ON_OOM))
		unregister_oom_notifier(&balloon->oom);
}

/**
 * vbw_balloon_free - undo vbw_balloon_setup()
 * @balloon: the balloon, empty
 */
void vbw_balloon_free(struct vbw_balloon *balloon)
{
	mutex_destroy(&balloon->lock);
}

/**
 * vbw_balloon_cancel - wait for the work; the device stops
 * @balloon: the balloon
 */
void vbw_balloon_cancel(struct vbw_balloon *balloon)
{
	cancel_work_sync(&balloon->resize);
}

/**
 * vbw_balloon_deflate_all - take everything back
 * @balloon: of a device whose work does not run
 */
void vbw_balloon_deflate_all(struct vbw_balloon *balloon)
{
	/* Compaction may have some in its hands, and is about to put them back. */
	while (balloon->num_pages)
		if (!deflate(balloon, balloon->num_pages))
			msleep(PUT_BACK_MS);
	vbw_balloon_update_actual(balloon);
}
